/** The page's entry point: connects models, composer, buttons and keyboard shortcuts. */

import { listModels, onMissingKey, takeKey } from "./api.js";
import { showTurns, toggleSource } from "./answers.js";
import { answerAgain, ask, isRunning, onRunningChange, startAnew, stop } from "./chat.js";
import { asMarkdown, asRows, conversation, keep, problemText, restore } from "./conversation.js";
import { announce, askForKey, copyText, saveFile, showHelp } from "./dialogs.js";
import { closeSettings, settings, startSettings, toggleSettings } from "./settings.js";
import { preference, recall, remember, setPreference } from "./storage.js";
import { applyTexts, currentLanguage, label, setLanguage, t } from "./texts.js";

const find = (selector) => document.querySelector(selector);
const field = find("#message");
const sendButton = find("#send");
const pickers = [find("#model-a"), find("#model-b")];
const compareButton = find("#compare");
const menu = find("#menu");
let models = [];
let isEditing = false; // the message replaces the last question
let loadProblem = null;

async function loadModels() {
  showLoadProblem(null);
  try {
    models = await listModels();
  } catch (error) {
    showLoadProblem(error);
    return;
  }
  showModels();
}

function showLoadProblem(error) {
  loadProblem = error;
  find("#load-problem").hidden = !error;
  if (error) find("#load-problem-text").textContent = problemText(error);
}

function showModels() {
  const names = models.map((model) => model.id);
  const base = models.find((model) => model.isBase)?.id ?? names[0];
  const defaults = [names.find((name) => name !== base) ?? base, base];
  const kept = recall("models") ?? [];
  pickers.forEach((picker, column) => {
    picker.replaceChildren(...models.map(({ id, isBase }) => new Option(isBase ? `${id} (${t("base")})` : id, id)));
    picker.value = names.includes(kept[column]) ? kept[column] : defaults[column];
  });
  const canCompare = models.length > 1;
  compareButton.disabled = !canCompare;
  setComparing(canCompare && recall("comparing") === true);
  showButtons();
}

function setComparing(isComparing) {
  document.body.classList.toggle("is-comparing", isComparing);
  compareButton.setAttribute("aria-pressed", String(isComparing));
  label(compareButton, compareButton.disabled && models.length ? "compareNeeds" : "compare");
  find("#second-model").hidden = !isComparing;
  remember("comparing", isComparing);
}

function toggleComparing() {
  if (!compareButton.disabled) setComparing(compareButton.getAttribute("aria-pressed") !== "true");
}

function chosenModels() {
  const isComparing = compareButton.getAttribute("aria-pressed") === "true";
  return pickers.slice(0, isComparing ? 2 : 1).map((picker) => picker.value);
}

function send() {
  const question = field.value.trim();
  if (!question || !models.length) return;
  if (!ask(question, chosenModels(), isEditing)) return;
  field.value = "";
  setEditing(false);
  fitField();
  if (window.matchMedia("(pointer: coarse)").matches) field.blur(); // the keyboard would cover the answer
}

function setEditing(isOn) {
  isEditing = isOn;
  find("#editing").hidden = !isOn;
}

function editLast() {
  const last = conversation.turns.at(-1);
  if (!last || isRunning()) return;
  field.value = last.question;
  setEditing(true);
  fitField();
  field.focus();
}

function cancelEditing() {
  setEditing(false);
  field.value = "";
  fitField();
  field.focus();
}

function newChat() {
  startAnew();
  setEditing(false);
  closeSettings();
  field.focus();
}

/** Fit the field's height to its text, within the style's limits. */
function fitField() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
  showButtons();
}

function showButtons() {
  const isBusy = isRunning();
  document.body.classList.toggle("is-running", isBusy);
  sendButton.disabled = !isBusy && (!field.value.trim() || !models.length);
  label(sendButton, isBusy ? "stop" : "send");
}

function exportAs(kind) {
  const name = `loratune-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`;
  if (kind === "markdown") saveFile(`${name}.md`, "text/markdown", asMarkdown(settings()));
  else saveFile(`${name}.json`, "application/json", asRows(settings()));
  menu.hidePopover();
}

const ACTIONS = {
  "copy-question": (turn) => copyText(turn.question),
  edit: () => editLast(),
  copy: (turn, column) => copyText(turn.answers[column].text),
  source: (turn, column) => toggleSource(turn.answers[column]),
  again: (turn, column) => answerAgain(column),
};

function onTurnClick(event) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.classList.contains("copy-code")) {
    copyText(button.closest(".code").querySelector("code").textContent);
    return;
  }
  const place = [...find("#turns").children].indexOf(button.closest(".turn"));
  const column = Number(button.closest(".answer")?.dataset.column ?? 0);
  ACTIONS[button.dataset.do]?.(conversation.turns[place], column);
}

function onFieldKey(event) {
  // During composition, Enter and the arrows belong to the input method; some browsers only signal it by key code 229.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !field.value) {
    event.preventDefault();
    editLast();
  }
}

const SHORTCUTS = {
  KeyN: newChat,
  KeyC: toggleComparing,
  KeyS: toggleSettings,
  KeyR: () => answerAgain(),
  KeyH: showHelp,
};

function onKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && !menu.matches(":popover-open")) {
    if (isRunning()) stop();
    else if (isEditing) cancelEditing();
    else closeSettings();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  }
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  setPreference("theme", theme);
}

function chooseLanguage(language) {
  setLanguage(language);
  announce("");
  showTurns();
  if (loadProblem) showLoadProblem(loadProblem);
  if (models.length) showModels();
}

function startMenu() {
  const theme = preference("theme", "auto");
  chooseTheme(theme);
  for (const each of document.querySelectorAll("[name=theme]")) {
    each.checked = each.value === theme;
    each.addEventListener("change", () => chooseTheme(each.value));
  }
  for (const each of document.querySelectorAll("[name=language]")) {
    each.checked = each.value === currentLanguage();
    each.addEventListener("change", () => chooseLanguage(each.value));
  }
  for (const each of document.querySelectorAll("[data-export]")) {
    each.addEventListener("click", () => exportAs(each.dataset.export));
  }
  find("#show-help").addEventListener("click", () => {
    menu.hidePopover();
    showHelp();
  });
}

function startComposer() {
  field.addEventListener("input", fitField);
  field.addEventListener("keydown", onFieldKey);
  sendButton.addEventListener("click", () => (isRunning() ? stop() : send()));
  find("#cancel-editing").addEventListener("click", cancelEditing);
  for (const each of document.querySelectorAll(".try")) {
    each.addEventListener("click", () => {
      field.value = each.textContent;
      send();
    });
  }
}

function startButtons() {
  find("#new-chat").addEventListener("click", newChat);
  compareButton.addEventListener("click", toggleComparing);
  for (const picker of pickers) {
    picker.addEventListener("change", () => remember("models", pickers.map((each) => each.value)));
  }
  find("#turns").addEventListener("click", onTurnClick);
  find("#load-again").addEventListener("click", loadModels);
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", keep);
  window.addEventListener("hashchange", () => takeKey() && loadModels());
}

takeKey();
applyTexts(document);
onMissingKey(askForKey);
onRunningChange(showButtons);
restore();
startSettings();
startMenu();
startComposer();
startButtons();
showTurns();
showButtons();
loadModels();
