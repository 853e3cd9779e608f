/** The page's icons; their shapes are the symbols at the top of the page. */

const SVG = "http://www.w3.org/2000/svg";

/** An icon by the name of its symbol; it is decorative, so its parent needs a label. */
export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS(SVG, "use");
  shape.setAttribute("href", `#icon-${name}`);
  picture.append(shape);
  return picture;
}
