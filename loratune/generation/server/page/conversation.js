/**
 * The conversation: its turns, the messages sent to a model, and the exports.
 *
 * A turn is {question, answers}; an answer is {model, text, reasoning, finish, problem, tokens, firstSeconds, rate}.
 * `finish` is null during streaming, then "stop", "length", "cancelled" or "error".
 */

import { t } from "./texts.js";
import { recall, remember } from "./storage.js";

export const conversation = { turns: [] };

/** Restore the turns of this tab; leaving the page cancels a streaming answer. */
export function restore() {
  const kept = recall("turns");
  if (!Array.isArray(kept)) return;
  conversation.turns = kept;
  for (const answer of kept.flatMap((turn) => turn.answers)) answer.finish ??= "cancelled";
}

/** Save the turns, to be restored when the page is reloaded. */
export function keep() {
  remember("turns", conversation.turns);
}

/** A new, empty answer. */
export function newAnswer(model) {
  return {
    model, text: "", reasoning: "", finish: null, problem: null, tokens: null, firstSeconds: null, rate: null,
  };
}

/**
 * The messages before the answer in a column of a turn.
 *
 * Each column continues with its own answers. A failed turn is left out, since it has no answer.
 */
export function messagesFor(place, column, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns.slice(0, place)) {
    const answer = turn.answers[column] ?? turn.answers[0];
    if (!answer.text) continue;
    messages.push({ role: "user", content: turn.question }, asMessage(answer));
  }
  return [...messages, { role: "user", content: conversation.turns[place].question }];
}

/** An answer as a message, with its reasoning, which the model's template keeps or drops. */
function asMessage({ text, reasoning }) {
  return { role: "assistant", content: text, ...(reasoning && { reasoning_content: reasoning }) };
}

/** The conversation as Markdown. */
export function asMarkdown(settings) {
  const parts = [`# ${t("conversation")}`];
  if (settings.system) parts.push(`**${t("system")}**`, quoted(settings.system));
  conversation.turns.forEach((turn, place) => {
    parts.push(`## ${t("exportQuestion")} ${place + 1}`, turn.question);
    for (const answer of turn.answers) {
      parts.push(`### ${answer.model}`);
      if (answer.reasoning) parts.push(`**${t("exportThinking")}**`, quoted(answer.reasoning.trim()));
      if (answer.text) parts.push(answer.text.trim());
      if (answer.finish === "error") parts.push(`*${problemText(answer.problem)}*`);
    }
  });
  return `${parts.join("\n\n")}\n`;
}

function quoted(text) {
  return text.split("\n").map((line) => `> ${line}`.trim()).join("\n");
}

/** The conversation as rows: one per column, with its messages and the metadata of each answer. */
export function asRows(settings) {
  const columns = Math.max(0, ...conversation.turns.map((turn) => turn.answers.length));
  const rows = Array.from({ length: columns }, (_, column) => {
    const answers = conversation.turns.map((turn) => turn.answers[column] ?? turn.answers[0]);
    const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    conversation.turns.forEach((turn, place) => {
      if (!answers[place].text) return;
      messages.push({ role: "user", content: turn.question }, asMessage(answers[place]));
    });
    return { messages, answers: answers.map(({ text, ...rest }) => rest), settings: settings.sampling };
  });
  return `${JSON.stringify(rows, null, 2)}\n`;
}

/** The error of an answer, in the page's language if there is a translation. */
export function problemText(problem) {
  return problem.key ? t(problem.key, problem.values) : problem.message;
}
