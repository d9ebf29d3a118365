/* Where versions part: numbers beside the text, and an outline of all of them. */

import { placeOf } from "./marks.js";
import { textOf } from "./pieces.js";

const MOST_ROWS = 400;
const PREVIEW_CHARS = 60;

function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

export const forkNumber = ({ index, count }) => `${index < 0 ? "–" : index + 1}/${count}`;

/* The fork that ‹ and › act on: the one chosen before, else the last one at or before the caret. */
export function activeFork(forks, chosen, caret) {
  const before = forks.filter((fork) => fork.offset <= caret);
  return forks.find((fork) => fork.node === chosen) ?? before[before.length - 1] ?? forks[0] ?? null;
}

/* Small ‹ 2/5 › beside the lines where versions part; `turn(fork, step)` goes to a neighbour. */
export function placeForks(gutter, editor, sheet, forks, active, turn) {
  const taken = new Map();
  gutter.replaceChildren(...forks.map((fork) => {
    const { top } = placeOf(editor, sheet, fork.offset);
    const line = Math.round(top / 24);
    const shift = taken.get(line) ?? 0;
    taken.set(line, shift + 1);
    const mark = document.createElement("span");
    mark.className = fork.node === active?.node ? "fork active" : "fork";
    mark.style.top = `${top + shift * 20}px`;
    const [back, on] = [button("‹", "Previous branch", () => turn(fork, -1)), button("›", "Next branch", () => turn(fork, 1))];
    back.tabIndex = -1;
    on.tabIndex = -1;
    mark.append(back, forkNumber(fork), on);
    return mark;
  }));
}

function preview(pieces) {
  const text = textOf(pieces).slice(0, PREVIEW_CHARS * 2).replace(/\s+/g, " ").trim();
  return text.slice(0, PREVIEW_CHARS) || (pieces.some((piece) => piece.end) ? "end of text" : "…");
}

/* The outline: a row a node, deeper where versions part. `go(node id)`. */
export function drawOutline(box, doc, go) {
  const shown = new Set(doc.tree.pathTo(doc.end));
  const rows = [];
  const visit = (id, depth) => {
    const node = doc.tree.get(id);
    if (id !== 0 && rows.length < MOST_ROWS) rows.push({ node, depth });
    const deeper = id !== 0 && node.children.length ? depth + 1 : depth;
    for (const child of node.children) visit(child, deeper);
  };
  visit(0, 0);
  if (rows.length < 2) {
    const note = document.createElement("p");
    note.textContent = "Retry, or pick another token: every version is kept here.";
    box.replaceChildren(note);
    return;
  }
  box.replaceChildren(...rows.map(({ node, depth }, index) => {
    const row = button("", preview(node.pieces), () => go(node.id));
    row.setAttribute("role", "treeitem");
    row.setAttribute("aria-level", String(depth + 1));
    row.setAttribute("aria-selected", String(node.id === doc.end));
    row.classList.toggle("shown", shown.has(node.id));
    row.classList.toggle("here", node.id === doc.end);
    row.tabIndex = node.id === doc.end || (index === 0 && !shown.has(doc.end)) ? 0 : -1;
    row.style.paddingLeft = `${0.5 + Math.min(depth, 12) * 0.8}rem`;
    const label = document.createElement("span");
    label.textContent = preview(node.pieces);
    row.append(label);
    return row;
  }));
}

/* Arrow keys walk the outline. */
export function walkOutline(box) {
  box.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const rows = [...box.querySelectorAll("button")];
    rows[rows.indexOf(document.activeElement) + step]?.focus();
    event.preventDefault();
  });
}
