/* Where versions part: numbers beside the text, and an outline of all of them. */

import { placeOf } from "./marks.js";
import { textOf } from "./pieces.js";
import { $ } from "./shell.js";

const LINE_PX = 20;
const MOST_DEPTH = 12;
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

const forkNumber = ({ index, count }) => `${index < 0 ? "–" : index + 1}/${count}`;

/* The fork that ‹ and › act on: the one chosen before, else the last one at or before the caret. */
function activeFork(forks, chosen, caret) {
  const before = forks.filter((fork) => fork.offset <= caret);
  return (
    forks.find((fork) => fork.node === chosen) ?? before[before.length - 1] ?? forks[0] ?? null
  );
}

function preview(pieces) {
  const text = textOf(pieces)
    .slice(0, PREVIEW_CHARS * 2)
    .replace(/\s+/g, " ")
    .trim();
  return text.slice(0, PREVIEW_CHARS) || (pieces.some((piece) => piece.end) ? "end of text" : "…");
}

export class BranchView {
  /* `page` has doc, editor and goTo(node id). */
  constructor(page) {
    this.page = page;
    this.sheet = document.querySelector(".sheet");
    this.forks = [];
    this.chosen = null;
    $("branches").addEventListener("keydown", (event) => walk(event));
  }

  /* The place where branches part is again the one at the caret. */
  forget() {
    this.chosen = null;
  }

  get #active() {
    return activeFork(this.forks, this.chosen, this.page.editor.selection.end);
  }

  /* Shows the neighbour of the branch on show, round and round. */
  turn(step, fork = null) {
    this.forks = this.page.doc.forks();
    const from = fork ?? this.#active;
    if (!from) return;
    const { index, count, children, node } = from;
    const beside = index < 0 ? (step > 0 ? 0 : count - 1) : (index + step + count) % count;
    this.page.goTo(children[beside]);
    this.chosen = node;
    this.showForks();
  }

  /* To the place before or after where branches part. */
  walk(step) {
    this.forks = this.page.doc.forks();
    const next = this.forks[this.forks.indexOf(this.#active) + step];
    if (!next) return;
    this.chosen = next.node;
    this.showForks();
    const { top } = this.page.editor.rangeOf(next.offset, next.offset).getBoundingClientRect();
    $("scroller").scrollTop += top - innerHeight / 2;
  }

  /* Small ‹ 2/5 › beside the lines where versions part, and one for the caret below the text. */
  showForks(forks = this.forks) {
    this.forks = forks;
    const active = this.#active;
    const taken = new Map();
    $("gutter").replaceChildren(
      ...forks.map((fork) => this.#mark(fork, fork.node === active?.node, taken)),
    );
    $("branch").hidden = !active;
    if (active) $("branch-number").textContent = forkNumber(active);
  }

  /* While several answers are drawn: which one is on show. */
  showAnswers({ answers, shown }) {
    $("gutter").replaceChildren();
    $("branch").hidden = answers.length < 2;
    $("branch-number").textContent = `${shown + 1}/${answers.length}`;
  }

  #mark(fork, isActive, taken) {
    const { top } = placeOf(this.page.editor, this.sheet, fork.offset);
    const line = Math.round(top / LINE_PX);
    const above = taken.get(line) ?? 0;
    taken.set(line, above + 1);
    const mark = document.createElement("span");
    mark.className = isActive ? "fork active" : "fork";
    mark.style.top = `${top + above * LINE_PX}px`;
    const back = button("‹", "Previous branch", () => this.turn(-1, fork));
    const on = button("›", "Next branch", () => this.turn(1, fork));
    back.tabIndex = -1;
    on.tabIndex = -1;
    mark.append(back, forkNumber(fork), on);
    return mark;
  }

  /* A row for each node, deeper where versions part. */
  drawOutline() {
    const { doc } = this.page;
    const rows = [];
    const visit = (id, depth) => {
      const node = doc.tree.get(id);
      if (id !== 0 && rows.length < MOST_ROWS) rows.push({ node, depth });
      for (const child of node.children) visit(child, id === 0 ? depth : depth + 1);
    };
    visit(0, 0);
    const note = document.createElement("p");
    note.textContent = "Retry, or pick another token: every version is kept here.";
    const shown = new Set(doc.tree.pathTo(doc.end));
    const items = rows.map(({ node, depth }) => this.#row(node, depth, shown));
    if (items.length && !items.some((item) => item.tabIndex === 0)) items[0].tabIndex = 0;
    $("branches").replaceChildren(...(items.length < 2 ? [note] : items));
  }

  #row(node, depth, shown) {
    const isEnd = node.id === this.page.doc.end;
    const row = button("", preview(node.pieces), () => this.page.goTo(node.id));
    row.setAttribute("role", "treeitem");
    row.setAttribute("aria-level", String(depth + 1));
    row.setAttribute("aria-selected", String(isEnd));
    row.classList.toggle("shown", shown.has(node.id));
    row.classList.toggle("here", isEnd);
    row.tabIndex = isEnd ? 0 : -1;
    row.style.paddingLeft = `${0.5 + Math.min(depth, MOST_DEPTH) * 0.8}rem`;
    const label = document.createElement("span");
    label.textContent = preview(node.pieces);
    row.append(label);
    return row;
  }
}

/* Arrow keys walk the outline. */
function walk(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.altKey) return;
  const rows = [...event.currentTarget.querySelectorAll("button")];
  rows[rows.indexOf(document.activeElement) + step]?.focus();
  event.preventDefault();
}
