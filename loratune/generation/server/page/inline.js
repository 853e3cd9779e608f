/**
 * Parses inline Markdown into plain data: emphasis, code, links and line breaks.
 *
 * A node is {kind: "text" | "code" | "math", text}, {kind: "em" | "strong" | "del", children},
 * {kind: "link", href, children} or {kind: "break"}. Time is linear in the text's length for any text.
 */

import { nest } from "./emphasis.js";

const SPECIAL = /[\\`*_~[\]!<&\nh$]/g;
const WORD = /[\p{L}\p{N}]/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE_URL = /https?:\/\/[^\s<>"'`，。；：！？、（）《》「」“”]{1,2000}/y;
const ANGLE_URL = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const LINE_BREAK_TAG = /<br {0,3}\/?>/iy;
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const TARGET = /\(([^\s()<>]{0,1000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,200}){0,3})(?: "[^"\n]{0,300}")?\)/y;
const MATH_ENDS = { "(": "\\)", "[": "\\]", $: "$$" };

/** Parse the text of a paragraph, heading or cell. */
export function parseInline(text) {
  return new Scanner(text).run();
}

/** Return a URL if it may be linked, else null. */
export function safeAddress(address) {
  if (!/^https?:\/\//i.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

class Scanner {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.textFrom = 0;
    this.tokens = [];
    this.brackets = []; // token indices of "[" that may still begin a link
    this.backticks = null; // length of a run of backticks → where such runs start
    this.missing = new Set(); // closing delimiters of formulas that do not occur in the rest of the text
  }

  run() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const found = SPECIAL.exec(text);
      this.at = found ? found.index : text.length;
      if (found && !this.special(found[0])) this.at += 1;
    }
    this.flush(text.length);
    return nest(this.tokens);
  }

  /** Parse the token at a special character; false if it is plain text. */
  special(character) {
    switch (character) {
      case "\\":
        return this.escape();
      case "`":
        return this.code();
      case "*":
      case "_":
      case "~":
        return this.delimiters(character);
      case "!":
        return this.text[this.at + 1] === "[" && this.open(2);
      case "[":
        return this.open(1);
      case "]":
        return this.close();
      case "<":
        return this.angle();
      case "&":
        return this.entity();
      case "\n":
        return this.newline();
      case "$":
        return this.text[this.at + 1] === "$" && this.formula("$", this.at);
      default:
        return this.bareUrl();
    }
  }

  /** End the current text at `end` and append a token; parsing continues at `next`. */
  push(token, end, next) {
    this.flush(end);
    this.tokens.push(token);
    this.at = this.textFrom = next;
    return true;
  }

  flush(end) {
    if (end > this.textFrom) this.tokens.push({ kind: "text", text: this.text.slice(this.textFrom, end) });
    this.textFrom = end;
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") return this.push({ kind: "break" }, this.at, this.at + 2);
    if ((next === "(" || next === "[") && this.formula(next, this.at)) return true;
    if (!ESCAPABLE.test(next)) return false;
    return this.push({ kind: "text", text: next }, this.at, this.at + 2);
  }

  /** A formula is kept verbatim: its stars and underscores are not emphasis. */
  formula(opening, start) {
    const ending = MATH_ENDS[opening];
    if (this.missing.has(ending)) return false;
    const end = this.text.indexOf(ending, start + 2);
    if (end < 0) this.missing.add(ending);
    if (end < start + 3) return false;
    return this.push({ kind: "math", text: this.text.slice(start, end + 2) }, start, end + 2);
  }

  code() {
    const size = runLength(this.text, this.at);
    this.backticks ??= backtickRuns(this.text);
    const starts = this.backticks.get(size) ?? [];
    while (starts.length && starts.at(-1) <= this.at) starts.pop();
    const start = this.at;
    if (!starts.length) {
      this.at += size;
      return true;
    }
    const end = starts.at(-1);
    let inner = this.text.slice(start + size, end).replaceAll("\n", " ");
    if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim()) inner = inner.slice(1, -1);
    return this.push({ kind: "code", text: inner }, start, end + size);
  }

  delimiters(character) {
    const size = runLength(this.text, this.at);
    const end = this.at + size;
    if (character === "~" && size !== 2) {
      this.at = end;
      return true;
    }
    return this.push({ kind: "run", character, size, ...flanks(this.text, this.at, end) }, this.at, end);
  }

  open(size) {
    this.brackets.push(this.tokens.length + (this.at > this.textFrom ? 1 : 0));
    return this.push({ kind: "text", text: this.text.slice(this.at, this.at + size) }, this.at, this.at + size);
  }

  /** At "]": a link to the URL in the following parentheses. */
  close() {
    const place = this.brackets.pop();
    TARGET.lastIndex = this.at + 1;
    const target = place === undefined ? null : TARGET.exec(this.text);
    const href = target && safeAddress(target[1]);
    if (!href) return false;
    this.flush(this.at);
    const label = this.tokens.splice(place).slice(1);
    this.brackets = []; // links do not nest
    const children = nest(label.length ? label : [{ kind: "text", text: target[1] }]);
    return this.push({ kind: "link", href, children }, this.at, TARGET.lastIndex);
  }

  angle() {
    LINE_BREAK_TAG.lastIndex = ANGLE_URL.lastIndex = this.at;
    if (LINE_BREAK_TAG.test(this.text)) return this.push({ kind: "break" }, this.at, LINE_BREAK_TAG.lastIndex);
    const found = ANGLE_URL.exec(this.text);
    return found !== null && this.link(found[1], ANGLE_URL.lastIndex);
  }

  bareUrl() {
    if (!this.text.startsWith("http", this.at) || WORD.test(this.text[this.at - 1] ?? "")) return false;
    BARE_URL.lastIndex = this.at;
    const found = BARE_URL.exec(this.text);
    const address = found && withoutTail(found[0]);
    return found !== null && this.link(address, this.at + address.length);
  }

  link(address, next) {
    const href = safeAddress(address);
    if (!href) return false;
    return this.push({ kind: "link", href, children: [{ kind: "text", text: address }] }, this.at, next);
  }

  entity() {
    ENTITY.lastIndex = this.at;
    const found = ENTITY.exec(this.text);
    return found !== null && this.push({ kind: "text", text: ENTITIES[found[1]] }, this.at, ENTITY.lastIndex);
  }

  /** A line break is kept, because models use it as a hard break. */
  newline() {
    let end = this.at;
    while (end > this.textFrom && this.text[end - 1] === " ") end -= 1;
    let next = this.at + 1;
    while (this.text[next] === " ") next += 1;
    return this.push({ kind: "break" }, end, next);
  }
}

function runLength(text, start) {
  let end = start + 1;
  while (text[end] === text[start]) end += 1;
  return end - start;
}

/** The start offsets of backtick runs by length, last first. */
function backtickRuns(text) {
  const runs = new Map();
  for (const found of text.matchAll(/`+/g)) {
    const size = found[0].length;
    if (!runs.has(size)) runs.set(size, []);
    runs.get(size).push(found.index);
  }
  for (const starts of runs.values()) starts.reverse();
  return runs;
}

/** Trailing punctuation of a URL belongs to the sentence, and so does an unmatched closing bracket. */
function withoutTail(address) {
  let end = address.length;
  while (end && ".,;:!?*_~])".includes(address[end - 1])) {
    if (address[end - 1] === ")" && address.lastIndexOf("(", end - 1) >= 0) break;
    end -= 1;
  }
  return address.slice(0, end);
}

/** Whether a run of stars, underscores or tildes can open or close; a CJK neighbour counts as the end of a word. */
function flanks(text, start, end) {
  const before = text[start - 1] ?? " ";
  const after = text[end] ?? " ";
  const [spaceBefore, spaceAfter] = [!before.trim(), !after.trim()];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore || CJK.test(before));
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter || CJK.test(after));
  if (text[start] !== "_") return { opens: left, closes: right };
  return { opens: left && (!right || markBefore), closes: right && (!left || markAfter) };
}
