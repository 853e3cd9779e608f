/** Matches delimiter runs of *, _ and ~ as CommonMark does. */

const MAX_DEPTH = 12;

/**
 * Convert tokens to nodes: matched runs become emphasis, and unmatched ones become text.
 *
 * A run is {kind: "run", character, size, opens, closes}; all other tokens are already nodes.
 */
export function nest(tokens) {
  const nodes = [];
  const openers = []; // {index in nodes, run, left, depth of the following nodes}
  const floors = new Map(); // kind of closer → openers below this index are known not to match
  for (const token of tokens) {
    if (token.kind !== "run") {
      nodes.push(token);
      continue;
    }
    const left = token.closes ? closeRun(token, nodes, openers, floors) : token.size;
    if (left && token.opens) openers.push({ place: nodes.length, run: token, left, depth: 0 });
    if (left) nodes.push({ kind: "text", text: token.character.repeat(left) });
  }
  return joined(nodes);
}

/** Match a closing run with openers; return the number of its characters that are left. */
function closeRun(run, nodes, openers, floors) {
  const key = `${run.character}${run.opens}${run.size % 3}`;
  let left = run.size;
  while (left) {
    const height = findOpener(run, openers, floors.get(key) ?? 0);
    if (height < 0) {
      floors.set(key, openers.length);
      return left;
    }
    const opener = openers[height];
    const used = Math.min(left, opener.left) >= 2 ? 2 : 1;
    const depth = deepest(openers, height) + 1;
    openers.length = depth > MAX_DEPTH ? height : height + 1;
    for (const [each, floor] of floors) floors.set(each, Math.min(floor, openers.length));
    if (depth > MAX_DEPTH) {
      if (height) openers[height - 1].depth = MAX_DEPTH;
      return left;
    }
    wrap(nodes, opener, used, run.character);
    left -= used;
    opener.left -= used;
    opener.depth = depth;
    if (!opener.left) openers.pop();
    if (!opener.left && height) openers[height - 1].depth = Math.max(openers[height - 1].depth, depth);
  }
  return 0;
}

function findOpener(run, openers, floor) {
  for (let height = openers.length - 1; height >= floor; height -= 1) {
    const other = openers[height].run;
    if (other.character !== run.character) continue;
    const isUneven = (run.opens || other.closes) && (run.size + other.size) % 3 === 0;
    if (!isUneven || (run.size % 3 === 0 && other.size % 3 === 0)) return height;
  }
  return -1;
}

function wrap(nodes, opener, used, character) {
  const children = joined(nodes.splice(opener.place + 1));
  const kind = character === "~" ? "del" : used === 2 ? "strong" : "em";
  nodes[opener.place].text = character.repeat(opener.left - used);
  nodes.push({ kind, children });
}

function deepest(openers, from) {
  let depth = 0;
  for (let height = from; height < openers.length; height += 1) depth = Math.max(depth, openers[height].depth);
  return depth;
}

/** Merge adjacent text nodes. */
function joined(nodes) {
  const kept = [];
  for (const node of nodes) {
    const last = kept.at(-1);
    if (node.kind !== "text") kept.push(node);
    else if (last?.kind === "text") last.text += node.text;
    else if (node.text) kept.push(node);
  }
  return kept;
}
