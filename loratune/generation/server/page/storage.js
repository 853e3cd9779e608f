/** What the browser keeps: the conversation and the API key for this tab, theme and language for good. */

const KEY = "loratune";

function read(storage, key) {
  try {
    return JSON.parse(window[storage].getItem(`${KEY}.${key}`));
  } catch {
    return null; // storage is switched off, or holds something else
  }
}

function write(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(`${KEY}.${key}`);
    else window[storage].setItem(`${KEY}.${key}`, JSON.stringify(value));
  } catch {
    // Full or switched off: the page works without, and forgets when it is loaded again.
  }
}

/** A value of this tab, or null. */
export function recall(key) {
  return read("sessionStorage", key);
}

/** Keep a value for this tab; null forgets it. */
export function remember(key, value) {
  write("sessionStorage", key, value);
}

/** A choice of appearance that was made before. */
export function preference(key, otherwise) {
  const value = read("localStorage", key);
  return typeof value === "string" ? value : otherwise;
}

/** Keep a choice of appearance. */
export function setPreference(key, value) {
  write("localStorage", key, value);
}
