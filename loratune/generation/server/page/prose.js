/** Renders Markdown as elements; a model's output only ever becomes text nodes. */

import { parseBlocks } from "./blocks.js";
import { parseInline } from "./inline.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";

const HEADINGS = ["h3", "h4", "h5", "h6", "h6", "h6"]; // the page itself uses h1 and h2

/** The Markdown of one answer, updated as the answer grows. */
export class Prose {
  /** @param {HTMLElement} root gets the blocks as children. */
  constructor(root) {
    this.root = root;
    this.text = "";
    this.starts = []; // offset in the text of each child's block
  }

  /** Render `text`; if it only grew, complete blocks are left unchanged. */
  show(text) {
    const kept = text.startsWith(this.text) ? Math.max(0, this.starts.length - 2) : 0;
    const from = kept ? this.starts[kept] : 0;
    const blocks = parseBlocks(text.slice(from));
    this.starts = [...this.starts.slice(0, kept), ...blocks.map((block) => from + block.start)];
    this.text = text;
    patchChildren(this.root, blocks.map(blockElement), kept);
  }
}

function element(name, className, children = []) {
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const child of children) made.append(child); // a spread call would exceed the limit on arguments
  return made;
}

function blockElement(block) {
  switch (block.kind) {
    case "heading":
      return element(HEADINGS[block.level - 1], `level-${block.level}`, inline(block.text));
    case "code":
      return codeElement(block);
    case "rule":
      return element("hr", "");
    case "quote":
      return element("blockquote", "", block.children.map(blockElement));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return element("p", "", inline(block.text));
  }
}

function codeElement({ language, text }) {
  const copy = element("button", "quiet copy-code", [icon("copy"), element("span", "", [t("copy")])]);
  copy.type = "button";
  copy.setAttribute("aria-label", t("copyCode"));
  const body = element("pre", "", [element("code", "", [text])]);
  markRegion(body, language ? `${t("code")}: ${language}` : t("code"));
  return element("div", "code", [element("div", "code-head", [element("span", "", [language]), copy]), body]);
}

/** Content that may be wider than the page: it scrolls by keyboard and is announced. */
function markRegion(body, label) {
  body.tabIndex = 0;
  body.setAttribute("role", "region");
  body.setAttribute("aria-label", label);
}

function listElement({ number, isLoose, items }) {
  const list = element(number === null ? "ul" : "ol", "");
  if (number !== null && number !== 1) list.setAttribute("start", String(number));
  for (const blocks of items) {
    const children = blocks.flatMap((block) =>
      block.kind === "paragraph" && !isLoose ? inline(block.text) : [blockElement(block)],
    );
    list.append(element("li", "", children));
  }
  return list;
}

function tableElement({ alignments, head, rows }) {
  const row = (name, cells) =>
    element("tr", "", cells.map((cell, place) => element(name, alignments[place], inline(cell))));
  const table = element("table", "", [element("thead", "", [row("th", head)])]);
  if (rows.length) table.append(element("tbody", "", rows.map((cells) => row("td", cells))));
  const frame = element("div", "table", [table]);
  markRegion(frame, t("table"));
  return frame;
}

function inline(text) {
  return parseInline(text).map(inlineNode);
}

function inlineNode(node) {
  switch (node.kind) {
    case "text":
      return document.createTextNode(node.text);
    case "break":
      return document.createElement("br");
    case "code":
      return element("code", "", [node.text]);
    case "math":
      return element("code", "math", [node.text]);
    case "link": {
      const link = element("a", "", node.children.map(inlineNode));
      link.href = node.href;
      link.title = node.href;
      link.target = "_blank";
      link.rel = "noopener noreferrer";
      return link;
    }
    default:
      return element(node.kind, "", node.children.map(inlineNode));
  }
}

/** Make the children of `parent` from index `from` on equal to `wanted`; equal nodes are left unchanged. */
function patchChildren(parent, wanted, from = 0) {
  let current = parent.childNodes[from] ?? null;
  for (const node of wanted) {
    if (current === null) {
      parent.append(node);
      continue;
    }
    const next = current.nextSibling;
    if (!patch(current, node)) current.replaceWith(node);
    current = next;
  }
  while (current !== null) {
    const next = current.nextSibling;
    current.remove();
    current = next;
  }
}

/** Make one node equal to another; false if it is of another kind. */
function patch(node, wanted) {
  if (node.nodeName !== wanted.nodeName) return false;
  if (node.nodeType === Node.TEXT_NODE) {
    if (wanted.data.startsWith(node.data)) node.appendData(wanted.data.slice(node.data.length));
    else node.data = wanted.data;
    return true;
  }
  if (node instanceof SVGElement) return node.isEqualNode(wanted);
  for (const { name } of [...node.attributes]) if (!wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of wanted.attributes) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  patchChildren(node, [...wanted.childNodes]);
  return true;
}
