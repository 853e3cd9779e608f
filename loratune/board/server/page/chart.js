/** Curves as SVG, drawn at the width that there is, with a readout of the step under the pointer. */

import { el, svg } from "./dom.js";

const HEIGHT = 240;
const LEFT = 52;
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 26;
/** Room beside the label of a step, and of each of its letters. */
const LABEL = 24;
const LETTER = 7;
const [FEWEST_STEPS, MOST_STEPS] = [3, 8];
const FEWEST_TO_SMOOTH = 40;

/**
 * @param {string} title
 * @param {{name: string, points: [number, number][], color: number, form: string}[]} lines color is that of
 *   theme.css's series, from 1; form is "dotted", "noisy" (many points get their running mean), or "".
 * @param {(value: number) => string} format
 */
export function chart(title, lines, format) {
  const shown = lines.filter((line) => line.points.length);
  if (!shown.length) return null;
  const picture = svg("svg", { role: "img", "aria-label": title, height: HEIGHT });
  const readout = el("div.readout", { "aria-live": "off" });
  const box = el("figure.chart", null, el("figcaption", null, title), picture, readout);
  const plot = { shown, format, picture, readout };
  showReadout(plot, null);
  new ResizeObserver(([entry]) => draw(plot, Math.floor(entry.contentRect.width))).observe(box);
  picture.addEventListener("pointermove", (event) => point(plot, event));
  picture.addEventListener("pointerleave", () => point(plot, null));
  return box;
}

function draw(plot, width) {
  const { shown, picture, format } = plot;
  if (width < LEFT + RIGHT + 20 || width === plot.width) return;
  const all = shown.flatMap((line) => line.points);
  const steps = bounds(all.map(([step]) => step));
  const ticks = niceTicks(...bounds(all.map(([, value]) => value)));
  const [low, high] = [ticks[0], ticks.at(-1)];
  const x = (step) => LEFT + ((step - steps[0]) / (steps[1] - steps[0] || 1)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  Object.assign(plot, { width, x, y, steps });
  picture.setAttribute("width", width);
  picture.replaceChildren(
    ...ticks.map((value) => [
      svg("line.grid", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
    ]).flat(),
    ...stepTicks(steps, width).map((step) =>
      svg("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, step.toLocaleString("en")),
    ),
    ...shown.flatMap((line) => curve(line, x, y)),
    svg("line.pointer", { y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }),
  );
}

/** A line; a noisy one of many points is faint, with its running mean over it. */
function curve({ points, color, form }, x, y) {
  const path = (values) => values.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const kind = `series-${color}`;
  if (points.length === 1 || form === "dotted") {
    const dots = points.length > 80 ? [points.at(-1)] : points;
    return [
      svg(`path.curve.${kind}`, { d: path(points) }),
      ...dots.map(([step, value]) => svg(`circle.${kind}`, { cx: x(step), cy: y(value), r: 3.2 })),
    ];
  }
  if (points.length < FEWEST_TO_SMOOTH || form !== "noisy") return [svg(`path.curve.${kind}`, { d: path(points) })];
  return [svg(`path.curve.faint.${kind}`, { d: path(points) }), svg(`path.curve.${kind}`, { d: path(smoothed(points)) })];
}

function smoothed(points) {
  const keep = 1 - 1 / Math.max(4, points.length / 25);
  let [mean, weight] = [0, 0];
  return points.map(([step, value]) => {
    mean = keep * mean + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return [step, mean / weight];
  });
}

function point(plot, event) {
  if (!plot.x) return;
  const mark = plot.picture.querySelector(".pointer");
  mark.setAttribute("visibility", event ? "visible" : "hidden");
  if (!event) return showReadout(plot, null);
  const at = event.clientX - plot.picture.getBoundingClientRect().left;
  const share = (at - LEFT) / (plot.width - LEFT - RIGHT);
  const wanted = plot.steps[0] + share * (plot.steps[1] - plot.steps[0]);
  const step = nearest(plot.shown.flatMap((line) => line.points), wanted)[0];
  for (const end of ["x1", "x2"]) mark.setAttribute(end, plot.x(step));
  showReadout(plot, step);
}

/** The legend, with the values at a step, or the newest ones. */
function showReadout({ shown, format, readout }, step) {
  readout.replaceChildren(
    ...shown.map(({ name, points, color }) => {
      const [at, value] = step === null ? points.at(-1) : nearest(points, step);
      const told = `${format(value)} at step ${at.toLocaleString("en")}`;
      return el("span.entry", null, el(`i.swatch.series-${color}`), el("span", null, name), el("b", null, told));
    }),
  );
}

function nearest(points, step) {
  return points.reduce((best, each) => (Math.abs(each[0] - step) < Math.abs(best[0] - step) ? each : best));
}

function bounds(values) {
  return values.reduce(([low, high], each) => [Math.min(low, each), Math.max(high, each)], [Infinity, -Infinity]);
}

/** The smallest round distance that fits, at which a spread has at most so many parts. */
function roundDistance(spread, most, fits = () => true) {
  const power = 10 ** Math.floor(Math.log10(spread / most));
  return [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => spread / each <= most && fits(each));
}

/** About five round values that enclose two others. */
function niceTicks(low, high) {
  const size = roundDistance(high - low || Math.abs(high) || 1, 5);
  const first = Math.floor(low / size + 1e-9);
  const count = Math.max(1, Math.ceil(high / size - 1e-9) - first);
  return Array.from({ length: count + 1 }, (_, at) => (first + at) * size);
}

/** A few round steps between two others, as far as there is room. */
function stepTicks([first, last], width) {
  const room = (width - LEFT - RIGHT) / (LABEL + last.toLocaleString("en").length * LETTER);
  const most = Math.min(MOST_STEPS, Math.max(FEWEST_STEPS, Math.floor(room)));
  const size = roundDistance(Math.max(last - first, most), most, Number.isInteger);
  const start = Math.ceil(first / size) * size;
  return Array.from({ length: Math.floor((last - start) / size) + 1 }, (_, at) => start + at * size);
}
