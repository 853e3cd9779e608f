/** The API key form, the help, and notifications on screen and for screen readers. */

import { t } from "./texts.js";

const keyDialog = document.querySelector("#key-dialog");
const keyForm = document.querySelector("#key-form");
const note = document.querySelector("#note");
const status = document.querySelector("#status");
let noteTimer = 0;

/** Ask for the API key; null if the form was closed without one. */
export function askForKey(wasWrong) {
  keyForm.reset();
  document.querySelector("#key-wrong").hidden = !wasWrong;
  keyDialog.returnValue = "";
  keyDialog.showModal();
  return new Promise((resolve) => {
    keyDialog.addEventListener("close", () => resolve(keyDialog.returnValue || null), { once: true });
  });
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  keyDialog.close(keyForm.elements.key.value.trim());
});
for (const button of document.querySelectorAll("[data-do=close-dialog]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}

/** Show the keyboard shortcuts and where the conversation is stored. */
export function showHelp() {
  const help = document.querySelector("#help-dialog");
  if (!help.open) help.showModal();
}

/** Show a notification that disappears by itself. */
export function notify(text) {
  announce(text);
  note.textContent = text;
  note.classList.add("is-shown");
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => note.classList.remove("is-shown"), 1800);
}

/** Announce the state of an answer to screen readers, without every chunk of its text. */
export function announce(text) {
  status.textContent = text;
}

/** Copy a text, with execCommand on pages where the clipboard API is not available (plain HTTP). */
export async function copyText(text) {
  notify(t((await writeClipboard(text)) ? "copied" : "copyFailed"));
}

async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "visually-hidden";
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    before?.focus();
    return isCopied;
  }
}

/** Download a text as a file. */
export function saveFile(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
