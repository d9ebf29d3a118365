/* A document: the text as it stands, every version worth keeping, undo and redo. No DOM here. */

import { joined, lengthOf, splice, textOf } from "./pieces.js";
import { Tree } from "./tree.js";

const MOST_UNDO_STEPS = 500;
const TYPING_PAUSE_MS = 1200;

export class TextDocument {
  constructor() {
    this.pieces = [];
    this.runs = {};
    this.tree = new Tree();
    this.end = 0;
    this.past = [];
    this.future = [];
    this.lastEdit = null;
    this.settled = this.pieces;
  }

  get text() {
    return textOf(this.pieces);
  }

  get length() {
    return lengthOf(this.pieces);
  }

  /* Typed change of characters start…end. `selection` is what was selected before it. */
  edit(start, end, inserted, { selection = { start, end }, now = 0 } = {}) {
    const edit = {
      kind: kindOf(start, end, inserted),
      start,
      stop: start + inserted.length,
      end,
      now,
    };
    if (!continues(this.lastEdit, edit)) this.#remember(selection);
    this.lastEdit = edit;
    this.future = [];
    this.pieces = splice(this.pieces, start, end, inserted);
  }

  /* Any other change of the text, as one step of undo. */
  replace(pieces, selection = this.#atEnd()) {
    this.#remember(selection);
    this.lastEdit = null;
    this.future = [];
    this.pieces = pieces;
  }

  /* Follows what is being drawn: the step of undo was made when it began. */
  extend(pieces) {
    this.pieces = pieces;
  }

  /* Scores found for the same text: no step of undo. */
  annotate(pieces) {
    if (textOf(pieces) !== this.text) throw new Error("annotations must leave the text as it is");
    this.pieces = pieces;
  }

  /* The selection to restore, or null where there is nothing to undo. */
  undo(selection) {
    return this.#travel(this.past, this.future, selection);
  }

  redo(selection) {
    return this.#travel(this.future, this.past, selection);
  }

  #travel(from, to, selection = this.#atEnd()) {
    const step = from.pop();
    if (!step) return null;
    to.push({ pieces: this.pieces, selection });
    this.pieces = step.pieces;
    this.lastEdit = null;
    return step.selection;
  }

  #remember(selection) {
    this.past.push({ pieces: this.pieces, selection });
    if (this.past.length > MOST_UNDO_STEPS) this.past.shift();
  }

  #atEnd() {
    return { start: this.length, end: this.length };
  }

  /* Enters the text, as it stands, into the tree. */
  settle() {
    if (this.settled === this.pieces) return;
    this.end = this.tree.put(this.pieces);
    // An edit that was taken back leads to where the scores still hold.
    if (this.pieces.some((piece) => piece.stale)) this.pieces = this.tree.piecesTo(this.end);
    this.settled = this.pieces;
  }

  /* Keeps versions that were drawn beside the one on show. */
  keep(versions) {
    for (const pieces of versions) this.tree.put(pieces);
    this.settled = null;
    this.settle();
  }

  /* Where versions part along the text: the offset, the branches, and which one is shown.
     `index` is −1 at the end of the text where others go on. */
  forks() {
    this.settle();
    const path = this.tree.pathTo(this.end);
    const forks = [];
    let offset = 0;
    path.forEach((id, position) => {
      const node = this.tree.get(id);
      offset += lengthOf(node.pieces);
      const index = node.children.indexOf(path[position + 1]);
      if (node.children.length > 1 || (node.children.length && index < 0)) {
        forks.push({
          node: id,
          offset,
          children: node.children,
          index,
          count: node.children.length,
        });
      }
    });
    return forks;
  }

  /* Shows the version that ends at or below a node of the tree. */
  goTo(id) {
    this.settle();
    const leaving = this.tree.get(this.end);
    if (!leaving.children.length) leaving.kept = true;
    const leaf = this.tree.leafBelow(id);
    this.replace(this.tree.piecesTo(leaf));
    this.tree.get(leaf).kept = false;
    this.settle();
  }

  /* The text before its last drawn stretch: where another try begins. What was picked by hand at
     the stretch's beginning stays. */
  beforeLastRun() {
    const pieces = this.pieces;
    const run = pieces[pieces.length - 1]?.run;
    if (run === undefined) return pieces;
    let first = pieces.length;
    while (first && pieces[first - 1].run === run && !pieces[first - 1].picked) first--;
    return pieces.slice(0, first);
  }

  /* What is known of the run that drew the end of the text; null where that was typed. */
  lastRun() {
    return this.runs[this.pieces[this.pieces.length - 1]?.run] ?? null;
  }

  upTo(offset) {
    return splice(this.pieces, offset, this.length, "");
  }

  /* How many versions go on after the text of `base`, which the shown version begins with. */
  numAfter(base) {
    const length = lengthOf(base);
    return this.forks().find((fork) => fork.offset === length)?.count ?? 1;
  }

  /* The text up to a token, with another one in its place. */
  withAlternative(index, alternative, run) {
    const { id, name, text, logprob } = alternative;
    const { top } = this.pieces[index];
    const token = { text, id, name, logprob, top, run, at: 0, picked: true };
    return joined(this.pieces.slice(0, index), [token]);
  }
}

function kindOf(start, end, inserted) {
  if (start === end && inserted.length <= 2 && inserted !== "\n") return "type";
  return inserted ? "replace" : "delete";
}

function continues(last, edit) {
  if (!last || last.kind !== edit.kind || edit.kind === "replace") return false;
  if (edit.now - last.now > TYPING_PAUSE_MS) return false;
  if (edit.kind === "type") return edit.start === last.stop;
  return edit.end === last.start || edit.start === last.start;
}
