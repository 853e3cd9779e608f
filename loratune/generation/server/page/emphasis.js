/** Match runs of stars, underscores and tildes with each other, as CommonMark does it. */

const MAX_DEPTH = 12;

/**
 * The nodes of a row of tokens: runs with a partner become emphasis, those without become text.
 *
 * A run is {kind: "run", character, size, opens, closes}; every other token is a node already.
 */
export function nest(tokens) {
  const nodes = [];
  const openers = []; // {place in nodes, run, left, depth of what follows}
  const floors = new Map(); // kind of closer → openers below this height have been seen not to match
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

/** Use up a closing run as far as openers match; how many of its characters are left. */
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

/** Neighbouring texts become one. */
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
