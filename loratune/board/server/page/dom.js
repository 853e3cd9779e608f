/** Makes elements. Texts become text nodes, so nothing that a run holds is ever read as HTML. */

/**
 * @param {string} tag name of the element, with classes: "p.dim.small".
 * @param {object | null} attributes attributes and, as functions, listeners.
 * @param {...(Node | string | number | null | false | Array)} children null and false are left out.
 */
export function el(tag, attributes = null, ...children) {
  const [name, ...classes] = tag.split(".");
  return filled(document.createElement(name), classes, attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = null, ...children) {
  const [name, ...classes] = tag.split(".");
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), classes, attributes, children);
}

function filled(node, classes, attributes, children) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== false && child !== undefined));
  return node;
}

/** The address of a run's view, or of the comparison of several. */
export function address(...names) {
  const view = names.length > 1 ? "compare" : "run";
  return `#/${view}/${names.map(encodeURIComponent).join("/")}`;
}

/** A table in a box that scrolls by itself. Cells are nodes, texts, or {node, kind, label}. */
export function table(head, rows, kind = "") {
  const cell = (tag) => (one) => el(tag, { class: one?.kind ?? null, "data-label": one?.label ?? null }, one?.node ?? one ?? "–");
  return el(
    "div.scroll",
    null,
    el(
      "table",
      { class: kind },
      el("thead", null, el("tr", null, head.map(cell("th")))),
      el("tbody", null, rows.map((row) => el("tr", null, row.map(cell("td"))))),
    ),
  );
}

/** A titled part of a view; nothing if it has no content. */
export function section(title, ...content) {
  const shown = content.flat(9).filter(Boolean);
  return shown.length ? el("section", null, el("h2", null, title), shown) : null;
}

/** A part that can be unfolded and stays so when the view is drawn again. */
export function fold(key, title, ...content) {
  return el("details", { "data-key": key }, el("summary", null, title), el("div.folded", null, content));
}

const STATES = { running: "live", finished: "good", interrupted: "dim", crashed: "bad", diverged: "bad", failed: "bad", damaged: "bad" };
const VERDICTS = { better: "good", worse: "bad", "no difference": "dim" };

export function chip(text, kind = "dim") {
  return el(`span.chip.${kind}`, null, text);
}

export function stateChip(state) {
  return chip(state, STATES[state]);
}

export function verdictChip(verdict) {
  return chip(verdict, VERDICTS[verdict]);
}

export function number(value, digits = 4) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
}

/** A size as `console.memory` writes it. */
export function bytes(size) {
  let [text, value] = [`${size} B`, size / 1e3];
  for (const unit of ["kB", "MB", "GB", "TB"]) {
    if (value < 1) break;
    value = Number(value.toFixed(value < 99.95 ? 1 : 0));
    [text, value] = [`${value.toFixed(value < 100 ? 1 : 0)} ${unit}`, value / 1e3];
  }
  return text;
}

/** How long ago a time was. */
export function age(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (!Number.isFinite(seconds)) return "–";
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  const [size, unit] = units.find(([each]) => seconds >= each) ?? [1, "s"];
  return `${Math.max(0, Math.floor(seconds / size))} ${unit}`;
}
