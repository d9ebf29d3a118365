/* The text on the page: one text node that the browser edits and whose changes are read back.

   Origin and scores of the text are painted over it (marks.js), so there is nothing in it but the
   text: what is shown is what is sent, to the last space. */

import { changeBetween } from "./pieces.js";

const ROOM_PX = 60; // below the line that is written

export function rangeIn(node, start, end) {
  const range = new Range();
  range.setStart(node, Math.min(start, node.data.length));
  range.setEnd(node, Math.min(end, node.data.length));
  return range;
}

/* The place between characters that is nearest to a point of the screen, as [node, offset]. */
function caretAt(x, y) {
  if (document.caretPositionFromPoint) {
    const position = document.caretPositionFromPoint(x, y);
    return [position?.offsetNode, position?.offset];
  }
  const range = document.caretRangeFromPoint(x, y);
  return [range?.startContainer, range?.startOffset];
}

/* Offset of the character of a text node under a point of the screen; −1 where there is none. */
export function offsetIn(node, x, y) {
  const [found, offset] = caretAt(x, y);
  if (found !== node) return -1;
  for (const from of [offset - 1, offset]) {
    if (from < 0 || from >= node.data.length) continue;
    for (const box of rangeIn(node, from, from + 1).getClientRects()) {
      if (x >= box.left && x < box.right && y >= box.top && y < box.bottom) return from;
    }
  }
  return -1;
}

export class Editor {
  /* `on`: edit(start, end, inserted, selectionBefore), undo(), redo(), select(), and text(): what
     the text was before the browser changed it. */
  constructor(element, on) {
    this.element = element;
    this.frame = element.closest(".scroller");
    this.on = on;
    this.node = document.createTextNode("");
    this.locked = false;
    this.editable = true;
    this.known = { start: 0, end: 0 };
    this.#normalise("");
    this.setEditable(true);
    element.addEventListener("beforeinput", (event) => this.#beforeInput(event));
    element.addEventListener("input", () => this.#read());
    element.addEventListener("compositionend", () => this.#read());
    element.addEventListener("paste", (event) => this.#paste(event));
    element.addEventListener("drop", (event) => this.#drop(event));
    element.addEventListener("copy", (event) => this.#copy(event));
    element.addEventListener("pointerdown", () => {
      this.pointed = true;
    });
    element.addEventListener("focus", () => this.#focused());
    document.addEventListener("selectionchange", () => this.#noteSelection());
  }

  get text() {
    return this.node.data;
  }

  /* What is selected, or was when the text last had the focus. */
  get selection() {
    this.known = this.#domSelection() ?? this.known;
    return this.known;
  }

  /* Shows a text; touches only what differs, so that selection and layout stay. */
  show(text, selection) {
    if (text !== this.node.data || !this.#isNormal()) {
      if (!this.#isNormal()) this.#normalise(this.node.data);
      const { start, end, inserted } = changeBetween(this.node.data, text);
      this.node.replaceData(start, end - start, inserted);
    }
    this.element.classList.toggle("blank", !text);
    if (selection) this.select(selection);
  }

  select({ start, end }) {
    const length = this.node.data.length;
    this.known = { start: Math.min(start, length), end: Math.min(end, length) };
    const { anchorNode } = getSelection();
    if (document.activeElement !== this.element && !this.element.contains(anchorNode)) return;
    getSelection().setBaseAndExtent(this.node, this.known.start, this.node, this.known.end);
  }

  focus(selection = this.selection) {
    this.element.focus({ preventScroll: true });
    this.select(selection);
  }

  /* While locked the text can be read and selected, not changed. */
  lock(locked) {
    this.locked = locked;
    this.element.setAttribute("aria-readonly", String(locked));
  }

  setEditable(editable) {
    this.editable = editable;
    this.element.setAttribute("contenteditable", editable ? "plaintext-only" : "false");
    // Browsers that do not know the value edit rich text; formatting is refused anyway.
    if (editable && !this.element.isContentEditable)
      this.element.setAttribute("contenteditable", "true");
    this.element.tabIndex = 0;
  }

  rangeOf(start, end) {
    return rangeIn(this.node, start, end);
  }

  offsetAt(x, y) {
    return offsetIn(this.node, x, y);
  }

  /* Back by keyboard the caret is where it was; a pointer says itself where. */
  #focused() {
    if (!this.pointed) this.select(this.known);
    this.pointed = false;
  }

  #isNormal() {
    const { childNodes } = this.element;
    return (
      childNodes.length === 2 && childNodes[0] === this.node && childNodes[1].nodeName === "BR"
    );
  }

  /* The line break at the end makes a last empty line visible. */
  #normalise(text) {
    this.node.data = text;
    this.element.replaceChildren(this.node, document.createElement("br"));
  }

  #beforeInput(event) {
    this.known = this.selection; // as it is before the change
    if (this.locked || event.inputType.startsWith("format")) {
      event.preventDefault();
    } else if (event.inputType === "insertParagraph" || event.inputType === "insertLineBreak") {
      event.preventDefault();
      this.#replaceSelection("\n");
    } else if (event.inputType === "insertText" && /[\r\n]/.test(event.data ?? "")) {
      event.preventDefault(); // phones paste like this, and browsers drop the new lines
      this.#replaceSelection(plain(event.data));
    } else if (event.inputType === "historyUndo" || event.inputType === "historyRedo") {
      event.preventDefault();
      this.on[event.inputType === "historyUndo" ? "undo" : "redo"]();
    }
  }

  #replaceSelection(inserted) {
    const before = this.selection;
    const after = before.start + inserted.length;
    this.on.edit(before.start, before.end, inserted, before);
    this.select({ start: after, end: after });
    this.#bringIn(this.#boxAt(after, after));
  }

  #boxAt(start, end) {
    const boxes = this.rangeOf(start, end).getClientRects();
    return boxes[boxes.length - 1] ?? this.element.getBoundingClientRect();
  }

  get #endBox() {
    const { length } = this.node.data;
    return this.#boxAt(Math.max(0, length - 1), length);
  }

  endIsVisible() {
    return this.#endBox.top < this.frame.getBoundingClientRect().bottom;
  }

  scrollToEnd() {
    this.#bringIn(this.#endBox);
  }

  #bringIn(box) {
    const below = box.bottom + ROOM_PX - this.frame.getBoundingClientRect().bottom;
    if (below > 0) this.frame.scrollTop += below;
  }

  #paste(event) {
    event.preventDefault();
    if (this.locked || !this.editable) return;
    this.#replaceSelection(plain(event.clipboardData.getData("text/plain")));
  }

  /* Text from elsewhere goes in where it is dropped; text from here moves there. */
  #drop(event) {
    const dropped = plain(event.dataTransfer.getData("text/plain"));
    const [node, offset] = caretAt(event.clientX, event.clientY);
    if (!dropped) return;
    event.preventDefault();
    if (this.locked || !this.editable || node !== this.node) return;
    const { start, end } = this.selection;
    const own = start < end && this.node.data.slice(start, end) === dropped;
    if (own && offset >= start && offset <= end) return;
    if (own) {
      this.on.edit(start, end, "", { start, end });
    }
    const at = own && offset > end ? offset - (end - start) : offset;
    this.select({ start: at, end: at });
    this.#replaceSelection(dropped);
  }

  #copy(event) {
    const { start, end } = this.selection;
    if (start === end) return;
    event.preventDefault();
    event.clipboardData.setData("text/plain", this.node.data.slice(start, end));
  }

  /* Takes over what the browser did to the text. */
  #read() {
    const before = this.known;
    const text = this.#domText();
    const caret = this.#domSelection()?.end ?? text.length;
    const known = this.on.text();
    if (!this.#isNormal()) {
      this.#normalise(text);
      this.select({ start: caret, end: caret });
    }
    if (this.locked) {
      this.show(known);
    } else if (text !== known) {
      const { start, end, inserted } = changeBetween(known, text, caret);
      this.on.edit(start, end, inserted, before);
    }
    this.#noteSelection();
  }

  #domText() {
    let text = "";
    const last = this.element.lastChild;
    for (const child of this.element.childNodes) {
      if (child.nodeName === "BR") text += child === last ? "" : "\n";
      else text += child.textContent;
    }
    return text;
  }

  #domSelection() {
    const selection = getSelection();
    if (!selection.rangeCount || !this.element.contains(selection.anchorNode)) return null;
    const range = selection.getRangeAt(0);
    const [start, end] = [
      this.#domOffset(range.startContainer, range.startOffset),
      this.#domOffset(range.endContainer, range.endOffset),
    ];
    return { start, end };
  }

  #domOffset(node, offset) {
    if (node === this.node) return offset;
    if (!this.element.contains(node)) return this.node.data.length;
    const range = new Range();
    range.setStart(this.element, 0);
    range.setEnd(node, offset);
    return range.toString().length;
  }

  #noteSelection() {
    const { start, end } = this.known;
    const now = this.selection;
    if (now.start !== start || now.end !== end) this.on.select();
  }
}

const plain = (text) => text.replaceAll("\r\n", "\n").replaceAll("\r", "\n");
