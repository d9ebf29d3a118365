/* All versions of a text that are worth keeping, as a tree. Pure.

   Each node holds the pieces between two places where versions part. Nothing that a model drew is
   ever taken out; typed text goes when it is edited, unless it was left for another branch
   (`kept`), since undo has it. */

import { commonPrefix, cut, joined } from "./pieces.js";

const numScored = (pieces) =>
  pieces.reduce((sum, piece) => sum + (piece.logprob !== undefined && !piece.stale), 0);

const newNode = (id, parent, pieces) => ({
  id,
  parent,
  pieces,
  children: [],
  last: null,
  kept: false,
});

export class Tree {
  constructor() {
    this.nodes = new Map([[0, newNode(0, null, [])]]);
    this.next = 1;
  }

  get(id) {
    return this.nodes.get(id);
  }

  add(parent, pieces) {
    const node = newNode(this.next++, parent, pieces);
    this.nodes.set(node.id, node);
    this.get(parent).children.push(node.id);
    return node;
  }

  /* Node ids from the root to the node, both included. */
  pathTo(id) {
    const path = [];
    for (let at = id; at !== null; at = this.get(at).parent) path.unshift(at);
    return path;
  }

  piecesTo(id) {
    return this.pathTo(id).reduce((pieces, at) => joined(pieces, this.get(at).pieces), []);
  }

  /* Where one ends by going the way that was gone last. */
  leafBelow(id) {
    let node = this.get(id);
    while (node.children.length)
      node = this.get(node.last ?? node.children[node.children.length - 1]);
    return node.id;
  }

  /* Makes the sequence a path of the tree and tidies the rest; returns the node where it ends. */
  put(pieces) {
    const end = this.#insert(pieces);
    let below = null;
    for (const id of this.pathTo(end).reverse()) {
      const node = this.get(id);
      node.last = below ?? node.last;
      below = id;
    }
    this.#tidy(end);
    return end;
  }

  #insert(pieces) {
    let node = this.get(0);
    let rest = pieces;
    while (rest.length) {
      const found = this.#childBeginning(node, rest);
      if (!found) return this.add(node.id, rest).id;
      const { child, match } = found;
      if (match.index < child.pieces.length) this.#split(child, match.index, match.offset);
      const [same, further] = cut(rest, match.otherIndex, match.otherOffset);
      if (numScored(same) > numScored(child.pieces)) child.pieces = same;
      rest = further;
      node = child;
    }
    return node.id;
  }

  /* Children part at their first piece or character, so at most one begins like `rest`. */
  #childBeginning(node, rest) {
    for (const id of node.children) {
      const child = this.get(id);
      const match = commonPrefix(child.pieces, rest);
      if (match.index || match.offset) return { child, match };
    }
    return null;
  }

  /* The node keeps its first part; the second becomes its only child. */
  #split(node, index, offset) {
    const [first, second] = cut(node.pieces, index, offset);
    const lower = { ...node, id: this.next++, parent: node.id, pieces: second };
    for (const id of lower.children) this.get(id).parent = lower.id;
    this.nodes.set(lower.id, lower);
    Object.assign(node, { pieces: first, children: [lower.id], last: lower.id, kept: false });
  }

  #tidy(end) {
    const current = new Set(this.pathTo(end));
    this.#prune(0, current);
    for (const node of [...this.nodes.values()]) {
      while (this.nodes.has(node.id) && this.#mayMerge(node, end)) this.#mergeWithChild(node, end);
    }
  }

  #prune(id, current) {
    const node = this.get(id);
    for (const child of [...node.children]) this.#prune(child, current);
    const drawn = node.pieces.some((piece) => piece.run !== undefined);
    if (node.children.length || drawn || node.kept || current.has(id) || id === 0) return;
    const parent = this.get(node.parent);
    parent.children = parent.children.filter((child) => child !== id);
    if (parent.last === id) parent.last = null;
    this.nodes.delete(id);
  }

  #mayMerge(node, end) {
    return node.id !== 0 && node.id !== end && node.children.length === 1;
  }

  #mergeWithChild(node, end) {
    const child = this.get(node.children[0]);
    if (child.id === end) {
      // The id of the end must survive: the child takes the node's place.
      child.pieces = joined(node.pieces, child.pieces);
      child.parent = node.parent;
      const parent = this.get(node.parent);
      parent.children = parent.children.map((id) => (id === node.id ? child.id : id));
      if (parent.last === node.id) parent.last = child.id;
      this.nodes.delete(node.id);
      node.children = [];
      return;
    }
    node.pieces = joined(node.pieces, child.pieces);
    node.children = child.children;
    node.last = child.last;
    node.kept = child.kept;
    for (const id of node.children) this.get(id).parent = node.id;
    this.nodes.delete(child.id);
  }
}
