/** Sends questions to the models and streams the answers, in several columns concurrently. */

import { scrollToEnd, showAnswer, showTurn, showTurns } from "./answers.js";
import { RequestError, streamAnswer } from "./api.js";
import { conversation, keep, messagesFor, newAnswer } from "./conversation.js";
import { announce } from "./dialogs.js";
import { areSettingsValid, settings } from "./settings.js";
import { t } from "./texts.js";

let running = null; // cancels the streaming answers
let whenChanged = () => {};

/** Whether answers are being streamed. */
export function isRunning() {
  return running !== null;
}

/** @param {() => void} react called when answers begin or end. */
export function onRunningChange(react) {
  whenChanged = react;
}

/** Cancel the streaming answers and keep their partial text. */
export function stop() {
  running?.abort();
}

/** Clear the conversation. */
export function startAnew() {
  stop();
  conversation.turns = [];
  keep();
  showTurns();
}

/**
 * Ask a question in a new turn, or in place of the last one.
 *
 * @returns {boolean} whether it was sent; false while answers are being streamed, or with invalid settings.
 */
export function ask(question, models, isReplacing) {
  if (isRunning() || !areSettingsValid()) return false;
  if (isReplacing) conversation.turns.pop();
  conversation.turns.push({ question, answers: models.map(newAnswer) });
  const place = conversation.turns.length - 1;
  showTurn(place);
  scrollToEnd();
  run(place, [...models.keys()]);
  return true;
}

/** Regenerate the answers of the last turn, in one column or in all. */
export function answerAgain(column = null) {
  const place = conversation.turns.length - 1;
  if (isRunning() || place < 0 || !areSettingsValid()) return;
  const { answers } = conversation.turns[place];
  const columns = column === null ? [...answers.keys()] : [column];
  for (const each of columns) answers[each] = newAnswer(answers[each].model);
  showTurn(place);
  run(place, columns);
}

async function run(place, columns) {
  const { answers } = conversation.turns[place];
  running = new AbortController();
  const { signal } = running;
  keep();
  whenChanged();
  announce(t("statusWriting"));
  const { system, sampling } = settings();
  await Promise.all(
    columns.map((column) => {
      const answer = answers[column];
      return write(answer, { model: answer.model, messages: messagesFor(place, column, system), ...sampling }, signal);
    }),
  );
  running = null;
  keep();
  whenChanged();
  for (const column of columns) {
    const { model, text, finish } = answers[column];
    if (finish !== "error") announce(t("statusDone", { model, text: text.slice(0, 2000) }));
  }
}

/** Stream one answer until it ends, is cancelled or fails. */
async function write(answer, body, signal) {
  const start = performance.now();
  let first = null;
  let last = start;
  try {
    for await (const piece of streamAnswer(body, signal)) {
      if (piece.text || piece.reasoning) {
        last = performance.now();
        first ??= last;
      }
      answer.text += piece.text;
      answer.reasoning += piece.reasoning;
      answer.tokens = piece.tokens ?? answer.tokens;
      answer.ending = piece.finish ?? answer.ending;
      showAnswer(answer);
    }
    answer.finish = answer.ending;
  } catch (error) {
    answer.finish = signal.aborted ? "cancelled" : "error";
    const { message, key = null, values = {} } = error;
    if (answer.finish === "error") answer.problem = { message, key, values };
    if (!(error instanceof RequestError || signal.aborted)) console.error(error);
  }
  delete answer.ending;
  if (first !== null) answer.firstSeconds = (first - start) / 1000;
  if (answer.tokens > 1 && last - first > 20) answer.rate = ((answer.tokens - 1) * 1000) / (last - first);
  showAnswer(answer, true);
}
