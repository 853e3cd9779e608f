/** The settings panel: system prompt and sampling. An empty field leaves the value to the server or the model. */

import { recall, remember } from "./storage.js";
import { label } from "./texts.js";

const form = document.querySelector("#settings-form");
const panel = document.querySelector("#settings");
const opener = document.querySelector("#open-settings");
const chat = document.querySelector("#chat");
const narrow = window.matchMedia("(max-width: 60rem)");
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** The settings for a request: {system, sampling}. */
export function settings() {
  const sampling = {};
  for (const name of NUMBERS) {
    const { value } = form.elements[name];
    if (value !== "") sampling[name] = Number(value);
  }
  const stops = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stops.length) sampling.stop = stops;
  return { system: form.elements.system.value.trim(), sampling };
}

/** Whether all fields are valid; if not, the panel opens at the first invalid one. */
export function areSettingsValid() {
  if (form.checkValidity()) return true;
  openSettings();
  form.reportValidity();
  return false;
}

/** Show the panel; on a narrow screen it covers the conversation. */
export function openSettings() {
  panel.hidden = false;
  opener.setAttribute("aria-expanded", "true");
  fitWidth();
  form.elements.system.focus();
}

/** Hide the panel and give the focus back; false if it was not open. */
export function closeSettings() {
  if (panel.hidden) return false;
  panel.hidden = true;
  opener.setAttribute("aria-expanded", "false");
  fitWidth();
  opener.focus();
  return true;
}

/** Open the panel or close it. */
export function toggleSettings() {
  if (!closeSettings()) openSettings();
}

function fitWidth() {
  chat.inert = narrow.matches && !panel.hidden;
}

/** Restore the saved settings, and save changes. */
export function startSettings() {
  for (const [name, value] of Object.entries(recall("settings") ?? {})) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  changed();
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed));
  narrow.addEventListener("change", fitWidth);
  opener.addEventListener("click", toggleSettings);
  document.querySelector("#close-settings").addEventListener("click", closeSettings);
}

function changed() {
  const fields = [...form.elements].filter((field) => field.name);
  form.elements.temperature.nextElementSibling.value = Number(form.elements.temperature.value).toFixed(2);
  const isChanged = fields.some((field) => field.value !== field.defaultValue);
  opener.classList.toggle("is-changed", isChanged);
  label(opener, isChanged ? "settingsChanged" : "settings");
  remember("settings", isChanged ? Object.fromEntries(fields.map((field) => [field.name, field.value])) : null);
}
