/** Renders the conversation: questions and streaming answers, with their buttons and statistics. */

import { conversation, problemText } from "./conversation.js";
import { Prose } from "./prose.js";
import { applyTexts, currentLanguage, t } from "./texts.js";

const list = document.querySelector("#turns");
const scroller = document.querySelector("#scroller");
const toLatest = document.querySelector("#to-latest");
const views = new Map(); // answer → AnswerView

let isFollowing = true; // the reader is at the end, so the page scrolls along
let lastTop = 0;

/** Render all turns again. */
export function showTurns() {
  views.clear();
  list.replaceChildren(...conversation.turns.map(turnElement));
  document.body.classList.toggle("is-empty", conversation.turns.length === 0);
  markLast();
  follow();
}

/** Render a turn, replacing its previous elements. */
export function showTurn(place) {
  const made = turnElement(conversation.turns[place]);
  if (list.children[place]) list.children[place].replaceWith(made);
  else list.append(made);
  document.body.classList.remove("is-empty");
  markLast();
  follow();
}

/** Update an answer, in the next frame or immediately. */
export function showAnswer(answer, isAtOnce = false) {
  const view = views.get(answer);
  if (isAtOnce) view?.show();
  else view?.showSoon();
}

/** Scroll to the end, and follow it while answers are streamed. */
export function scrollToEnd() {
  isFollowing = true;
  follow();
}

function follow() {
  if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
  toLatest.hidden = isFollowing || distanceToEnd() < 24;
}

function distanceToEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
}

scroller.addEventListener("scroll", () => {
  const distance = distanceToEnd();
  const wentUp = scroller.scrollTop < lastTop;
  if (distance < 2 || (distance < 24 && !wentUp)) isFollowing = true;
  else if (wentUp) isFollowing = false;
  lastTop = scroller.scrollTop;
  toLatest.hidden = isFollowing || distance < 24;
});
new ResizeObserver(follow).observe(scroller);
toLatest.addEventListener("click", scrollToEnd);

function copyOf(id) {
  const made = document.querySelector(id).content.firstElementChild.cloneNode(true);
  applyTexts(made);
  return made;
}

function turnElement(turn) {
  const made = copyOf("#turn-template");
  made.querySelector(".question-text").textContent = turn.question;
  const answers = made.querySelector(".answers");
  answers.classList.toggle("side-by-side", turn.answers.length > 1);
  turn.answers.forEach((answer, column) => {
    const view = new AnswerView(answer, column);
    views.set(answer, view);
    answers.append(view.root);
    view.show();
  });
  return made;
}

/** Only the last question can be edited, and only its answers regenerated. */
function markLast() {
  for (const each of list.children) each.classList.toggle("is-last", each === list.lastElementChild);
}

class AnswerView {
  constructor(answer, column) {
    this.answer = answer;
    this.root = copyOf("#answer-template");
    this.root.dataset.column = String(column);
    this.root.setAttribute("aria-label", t("answerOf", { model: answer.model }));
    this.part(".answer-model").textContent = answer.model;
    this.prose = new Prose(this.part(".answer-text"));
    this.reasoning = new Prose(this.part(".reasoning-text"));
    this.isDue = false;
    this.costMilliseconds = 0;
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  /** Render in the next frame. A slow text is rendered less often, so that the page stays responsive. */
  showSoon() {
    if (this.isDue) return;
    this.isDue = true;
    setTimeout(() => {
      requestAnimationFrame(() => {
        if (this.isDue) this.show();
      });
    }, this.costMilliseconds > 8 ? 4 * this.costMilliseconds : 0);
  }

  show() {
    const start = performance.now();
    this.isDue = false;
    const { answer } = this;
    const isRunning = answer.finish === null;
    this.root.classList.toggle("is-running", isRunning);
    this.root.setAttribute("aria-busy", String(isRunning));
    this.part(".waiting").hidden = !isRunning || Boolean(answer.text || answer.reasoning);
    this.showReasoning(isRunning);
    this.prose.show(answer.text);
    this.part(".answer-source").textContent = this.root.classList.contains("as-source") ? answer.text : "";
    const problem = this.part(".problem");
    problem.hidden = answer.finish !== "error";
    if (answer.finish === "error") this.part(".problem-text").textContent = problemText(answer.problem);
    this.part(".answer-foot").hidden = isRunning;
    this.part(".figures").replaceChildren(...figures(answer));
    follow();
    this.costMilliseconds = performance.now() - start;
  }

  /** Open while the model is thinking and collapsed once it answers, unless the reader has toggled it. */
  showReasoning(isRunning) {
    const { answer } = this;
    const box = this.part(".reasoning");
    const isThinking = isRunning && !answer.text;
    box.hidden = !answer.reasoning;
    this.part(".reasoning-title").textContent = t(isThinking ? "thinking" : "thought");
    if (box.dataset.chosen !== "yes") box.open = isThinking;
    this.reasoning.show(answer.reasoning);
  }

  toggleSource() {
    const isSource = this.root.classList.toggle("as-source");
    this.part("[data-do=source]").setAttribute("aria-pressed", String(isSource));
    this.show();
  }
}

/** Speed, time to the first token, length, and finish reason. */
function figures(answer) {
  const number = (value, digits) =>
    value.toLocaleString(currentLanguage(), { maximumFractionDigits: digits, minimumFractionDigits: digits });
  const parts = [];
  if (answer.rate !== null) parts.push(t("rate", { rate: number(answer.rate, answer.rate < 100 ? 1 : 0) }));
  if (answer.firstSeconds !== null) parts.push(t("firstToken", { seconds: number(answer.firstSeconds, 2) }));
  if (answer.tokens !== null) parts.push(t("tokenCount", { count: number(answer.tokens, 0) }));
  const made = parts.map((text) => Object.assign(document.createElement("span"), { textContent: text }));
  if (answer.finish === "length" || answer.finish === "cancelled") {
    const ending = document.createElement("span");
    ending.className = "ending";
    ending.textContent = t(answer.finish === "length" ? "finishLength" : "finishCancelled");
    made.push(ending);
  }
  return made;
}

/** Toggle the answer around an element between plain text and Markdown. */
export function toggleSource(answer) {
  views.get(answer).toggleSource();
}

list.addEventListener("click", (event) => {
  const summary = event.target.closest(".reasoning > summary");
  if (summary) summary.parentElement.dataset.chosen = "yes";
});
