/**
 * Parses Markdown blocks into plain data: headings, lists, tables, quotes, code, rules, paragraphs.
 *
 * Time is linear in the text's length: each line is parsed once per nesting level, and nesting is limited.
 */

const MAX_DEPTH = 10;
const MAX_COLUMNS = 100;
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?= |$)/;
const MARKER = /^( *)([-*+]|\d{1,9}[.)])(?= |$)/;
const QUOTE = /^ {0,3}> ?/;

/**
 * Parse a text into blocks.
 *
 * @returns {{kind: string, start: number}[]} top-level blocks with their offsets in `text`.
 */
export function parseBlocks(text) {
  const lines = text.split("\n").map(withoutTabs);
  const starts = [0];
  for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", end + 1)) starts.push(end + 1);
  return parseLines(lines, 0).map((block) => ({ ...block, start: starts[block.line] }));
}

function withoutTabs(line) {
  const plain = line.endsWith("\r") ? line.slice(0, -1) : line;
  const [indent] = /^[ \t]*/.exec(plain);
  return indent.includes("\t") ? indent.replaceAll("\t", "    ") + plain.slice(indent.length) : plain;
}

const READERS = [readFence, readHeading, readRule, readQuote, readList, readTable, readIndented, readParagraph];

function parseLines(lines, depth) {
  if (depth > MAX_DEPTH) return [{ kind: "paragraph", text: lines.join("\n").trim(), line: 0 }];
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    for (const read of READERS) {
      const found = read(lines, at, depth);
      if (!found) continue;
      blocks.push({ ...found.block, line: at });
      at = found.next;
      break;
    }
  }
  return blocks;
}

function indentOf(line) {
  let size = 0;
  while (line[size] === " ") size += 1;
  return size;
}

function withoutIndent(line, size) {
  return line.slice(Math.min(size, indentOf(line)));
}

/** Fenced code. Without a closing fence it extends to the end, as it does during streaming. */
function readFence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const mark = opening[1];
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], mark)) end += 1;
  const text = lines.slice(at + 1, end).map((line) => withoutIndent(line, indent)).join("\n");
  const [language = ""] = lines[at].slice(indent + mark.length).trim().split(" ", 1);
  return { block: { kind: "code", language: language.slice(0, 30), text }, next: end + 1 };
}

function closesFence(line, mark) {
  const inner = line.trim();
  if (inner.length < mark.length || indentOf(line) > 3) return false;
  for (const character of inner) if (character !== mark[0]) return false;
  return true;
}

function readHeading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const level = found[1].length;
  let text = lines[at].trim().slice(level).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  if (!end || text[end - 1] === " ") text = text.slice(0, end).trim();
  return { block: { kind: "heading", level, text }, next: at + 1 };
}

function isRule(line) {
  const mark = line.trim()[0];
  if (!"-*_".includes(mark ?? " ") || indentOf(line) > 3) return false;
  let count = 0;
  for (const character of line) {
    if (character === mark) count += 1;
    else if (character !== " ") return false;
  }
  return count >= 3;
}

function readRule(lines, at) {
  return isRule(lines[at]) ? { block: { kind: "rule" }, next: at + 1 } : null;
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { block: { kind: "quote", children: parseLines(inner, depth + 1) }, next: end };
}

/** The list marker at the start of a line, or null. */
function markerOf(line) {
  const found = MARKER.exec(line);
  if (!found || isRule(line)) return null;
  const [whole, indent, mark] = found;
  const gap = indentOf(line.slice(whole.length));
  const isEmpty = whole.length + gap === line.length;
  const width = whole.length + (isEmpty || gap > 4 ? 1 : gap);
  const number = mark.length > 1 ? Number(mark.slice(0, -1)) : null;
  return { indent: indent.length, width, kind: mark.at(-1), number, isEmpty };
}

function readList(lines, at, depth) {
  const first = markerOf(lines[at]);
  if (!first || first.indent > 3) return null;
  const items = [];
  let isLoose = false;
  let next = at;
  while (next < lines.length) {
    const marker = markerOf(lines[next]);
    if (!marker || marker.kind !== first.kind || marker.indent > first.indent + 1) break;
    const end = endOfItem(lines, next, marker);
    const [head, ...rest] = lines.slice(next, end);
    const inner = [head.slice(marker.width), ...rest.map((line) => withoutIndent(line, marker.width))];
    let filled = inner.length;
    while (filled > 1 && !inner[filled - 1].trim()) filled -= 1;
    const goesOn = end < lines.length && markerOf(lines[end])?.kind === first.kind;
    isLoose ||= inner.slice(0, goesOn ? undefined : filled).some((line, place) => place && !line.trim());
    items.push(parseLines(inner.slice(0, filled), depth + 1));
    next = end;
  }
  return { block: { kind: "list", number: first.number, isLoose, items }, next };
}

/** The end of a list item: before the next item, or before unindented text after a blank line. */
function endOfItem(lines, start, marker) {
  let end = start + 1;
  let isAfterBlank = false;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim()) {
      isAfterBlank = true;
      continue;
    }
    const isInside = indentOf(line) >= marker.indent + 2;
    if (!isInside && (isAfterBlank || interrupts(lines, end) || markerOf(line))) break;
    isAfterBlank = false;
  }
  return end;
}

/** Whether a line interrupts the paragraph above it. */
function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line)) return true;
  const marker = markerOf(line);
  if (marker && !marker.isEmpty && marker.indent < 4 && (marker.number ?? 1) === 1) return true;
  return tableAt(lines, at) !== null;
}

/** The cells of a table row; an escaped pipe is text. */
function cellsOf(line) {
  const inner = line.trim();
  const cells = [];
  let from = inner.startsWith("|") ? 1 : 0;
  for (let at = from; at < inner.length; at += 1) {
    if (inner[at] === "\\") {
      at += 1;
    } else if (inner[at] === "|") {
      cells.push(inner.slice(from, at));
      from = at + 1;
    }
  }
  if (from < inner.length) cells.push(inner.slice(from));
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** The column alignments if a table starts at a line, or null. */
function tableAt(lines, at) {
  const below = lines[at + 1];
  if (below === undefined || !lines[at].includes("|") || !/^[\s|:-]+$/.test(below) || !below.includes("-")) return null;
  const rules = cellsOf(below);
  if (rules.length > MAX_COLUMNS || rules.length !== cellsOf(lines[at]).length) return null;
  if (!rules.every((rule) => /^:?-+:?$/.test(rule))) return null;
  return rules.map((rule) => {
    if (!rule.endsWith(":")) return "";
    return rule.startsWith(":") ? "center" : "right";
  });
}

function readTable(lines, at) {
  const alignments = tableAt(lines, at);
  if (!alignments) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !FENCE.test(lines[end])) end += 1;
  const rows = lines.slice(at + 2, end).map((line) => cellsOf(line).slice(0, alignments.length));
  return { block: { kind: "table", alignments, head: cellsOf(lines[at]), rows }, next: end };
}

function readIndented(lines, at) {
  if (indentOf(lines[at]) < 4) return null;
  let end = at;
  let filled = at;
  for (; end < lines.length && (indentOf(lines[end]) >= 4 || !lines[end].trim()); end += 1) {
    if (lines[end].trim()) filled = end + 1;
  }
  const text = lines.slice(at, filled).map((line) => withoutIndent(line, 4)).join("\n");
  return { block: { kind: "code", language: "", text }, next: filled };
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  return { block: { kind: "paragraph", text: lines.slice(at, end).join("\n").trim() }, next: end };
}
