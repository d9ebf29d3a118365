/* Documents as JSON: for export, import and the browser's storage. No DOM here. */

import { TextDocument } from "./document.js";

const FORMAT = "lascaux-document";
const VERSION = 1;
const DECIMALS = 4;

const rounded = (value) => (value === undefined ? undefined : Number(value.toFixed(DECIMALS)));

function encodePiece(piece) {
  const { logprob, top, ...rest } = piece;
  if (piece.id === undefined) return piece.run === undefined ? piece.text : rest;
  const scores = logprob === undefined ? {} : { logprob: rounded(logprob) };
  if (top) scores.top = top.map((other) => [other.id, other.name, rounded(other.logprob)]);
  return { ...rest, ...scores };
}

function decodePiece(saved) {
  if (typeof saved === "string") return { text: saved };
  if (typeof saved?.text !== "string") throw new Error("a piece has no text");
  if (!saved.top) return saved;
  return { ...saved, top: saved.top.map(([id, name, logprob]) => ({ id, name, logprob })) };
}

/* A plain object; without the alternatives of tokens where `scores` is false. */
export function encodeDocument(doc, { scores = true } = {}) {
  doc.settle();
  const bare = (piece) => (piece.top ? { ...piece, top: undefined } : piece);
  const nodes = [...doc.tree.nodes.values()].map((node) => ({
    ...node,
    pieces: node.pieces.map((piece) => encodePiece(scores ? piece : bare(piece))),
  }));
  return { format: FORMAT, version: VERSION, end: doc.end, nodes, runs: doc.runs };
}

/* Raises an Error that says in words what is wrong with the object. */
export function decodeDocument(saved) {
  if (saved?.format !== FORMAT)
    throw new Error("this is not a document exported from the playground");
  if (saved.version !== VERSION) {
    throw new Error(`the document has format version ${saved.version}; this page reads ${VERSION}`);
  }
  const doc = new TextDocument();
  const nodes = new Map();
  for (const node of saved.nodes ?? []) {
    const whole = Array.isArray(node?.pieces) && Array.isArray(node.children);
    if (!whole) throw new Error(`node ${node?.id} has no pieces or no children`);
    nodes.set(node.id, { ...node, pieces: node.pieces.map(decodePiece) });
  }
  checkTree(nodes, saved.end);
  doc.tree.nodes = nodes;
  doc.tree.next = Math.max(...nodes.keys()) + 1;
  doc.runs = saved.runs ?? {};
  doc.end = saved.end;
  doc.pieces = doc.tree.piecesTo(doc.end);
  doc.settled = doc.pieces;
  return doc;
}

function checkTree(nodes, end) {
  const seen = new Set();
  const visit = (id, parent) => {
    const node = nodes.get(id);
    if (!node || node.parent !== parent || seen.has(id))
      throw new Error(`node ${id} is out of place`);
    seen.add(id);
    for (const child of node.children) visit(child, id);
    if (node.last !== null && !node.children.includes(node.last)) {
      throw new Error(`node ${id} points to a branch it does not have`);
    }
  };
  visit(0, null);
  if (seen.size !== nodes.size || !seen.has(end)) throw new Error("the tree of versions has gaps");
}
