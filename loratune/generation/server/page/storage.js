/** Browser storage: conversation and API key for this tab, theme and language permanently. */

const KEY = "loratune";

function read(storage, key) {
  try {
    return JSON.parse(window[storage].getItem(`${KEY}.${key}`));
  } catch {
    return null; // storage is disabled, or contains something else
  }
}

function write(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(`${KEY}.${key}`);
    else window[storage].setItem(`${KEY}.${key}`, JSON.stringify(value));
  } catch {
    // Storage is full or disabled: the page works, but a reload loses the value.
  }
}

/** Return a value of this tab, or null. */
export function recall(key) {
  return read("sessionStorage", key);
}

/** Store a value for this tab; null removes it. */
export function remember(key, value) {
  write("sessionStorage", key, value);
}

/** Return a stored preference. */
export function preference(key, otherwise) {
  const value = read("localStorage", key);
  return typeof value === "string" ? value : otherwise;
}

/** Store a preference. */
export function setPreference(key, value) {
  write("localStorage", key, value);
}
