/**
 * The conversation: its turns, what of them a model is sent, and its files.
 *
 * A turn is {question, answers}; an answer is {model, text, reasoning, finish, problem, tokens, firstSeconds, rate}.
 * `finish` is null while it is being written, then "stop", "length", "cancelled" or "error".
 */

import { t } from "./texts.js";
import { recall, remember } from "./storage.js";

export const conversation = { turns: [] };

/** Bring back the turns of this tab; an answer that was being written when the page was left was stopped by that. */
export function restore() {
  const kept = recall("turns");
  if (!Array.isArray(kept)) return;
  conversation.turns = kept;
  for (const answer of kept.flatMap((turn) => turn.answers)) answer.finish ??= "cancelled";
}

/** Keep the turns for when the page is loaded again. */
export function keep() {
  remember("turns", conversation.turns);
}

/** An answer of which nothing is there yet. */
export function newAnswer(model) {
  return {
    model, text: "", reasoning: "", finish: null, problem: null, tokens: null, firstSeconds: null, rate: null,
  };
}

/**
 * The messages that lead to the answer in a column of the turn at a place.
 *
 * Each column goes on with its own answers. A turn that failed is left out, since the model said nothing.
 */
export function messagesFor(place, column, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns.slice(0, place)) {
    const answer = turn.answers[column] ?? turn.answers[0];
    if (!answer.text) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: conversation.turns[place].question }];
}

/** The conversation for people. */
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

/** The conversation as rows: one per column, with its messages and what else is known of each answer. */
export function asRows(settings) {
  const columns = Math.max(0, ...conversation.turns.map((turn) => turn.answers.length));
  const rows = Array.from({ length: columns }, (_, column) => {
    const answers = conversation.turns.map((turn) => turn.answers[column] ?? turn.answers[0]);
    const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    conversation.turns.forEach((turn, place) => {
      if (!answers[place].text) return;
      messages.push({ role: "user", content: turn.question }, { role: "assistant", content: answers[place].text });
    });
    return { messages, answers: answers.map(({ text, ...rest }) => rest), settings: settings.sampling };
  });
  return `${JSON.stringify(rows, null, 2)}\n`;
}

/** What went wrong with an answer, in the page's language where the page knows it. */
export function problemText(problem) {
  return problem.key ? t(problem.key, problem.values) : problem.message;
}
