/* Which token is looked at: by pointer, by touch, by keyboard. */

import { paintToken } from "./marks.js";
import { pieceAt, starts } from "./pieces.js";
import { $, announce } from "./shell.js";
import { percent, visible } from "./tokens.js";

const ROOM_PX = 24; // between a token and a popover below it
const isToken = (piece) => piece && piece.id !== undefined;

export class TokenView {
  /* `page` has doc, editor, writer and pick(index, alternative). */
  constructor(page, popover) {
    this.page = page;
    this.popover = popover;
    this.on = false;
    this.at = -1;
    const { element } = page.editor;
    element.addEventListener("pointermove", (event) => this.#hover(event));
    element.addEventListener("pointerleave", () => popover.hideSoon());
    element.addEventListener("click", (event) => this.#tap(event));
    $("marks").addEventListener("click", (event) => {
      if (event.target.dataset.index) this.#open(Number(event.target.dataset.index), true);
    });
    $("scroller").addEventListener("scroll", () => this.#follow());
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (!event.target.closest("#popover, #editor, #marks, .messages")) popover.hide();
    });
  }

  #indexUnder(event) {
    const { doc, editor } = this.page;
    const offset = editor.offsetAt(event.clientX, event.clientY);
    const index = offset < 0 ? -1 : pieceAt(starts(doc.pieces), doc.pieces, offset);
    return isToken(doc.pieces[index]) ? index : -1;
  }

  #hover(event) {
    if (
      event.pointerType === "touch" ||
      event.buttons ||
      this.popover.pinned ||
      this.page.writer.running
    )
      return;
    const index = this.#indexUnder(event);
    if (index < 0) this.popover.hideSoon();
    else this.popover.showSoon(this.#keyOf(index), () => this.#what(index));
  }

  #tap(event) {
    if (!this.on || this.page.writer.running) return;
    const index = this.#indexUnder(event);
    if (index >= 0) this.#open(index, true);
    else this.popover.hide();
  }

  #keyOf(index) {
    return `${index}:${this.page.doc.pieces[index].id}`;
  }

  #what(index) {
    const { doc, editor } = this.page;
    const token = doc.pieces[index];
    const from = starts(doc.pieces)[index];
    const range = editor.rangeOf(from, from + token.text.length);
    const mark = $("marks").querySelector(`[data-index="${index}"]`);
    const box =
      mark?.getBoundingClientRect() ?? range.getClientRects()[0] ?? range.getBoundingClientRect();
    const note = token.stale
      ? "from before the text was edited"
      : token.picked
        ? "picked"
        : token.run === undefined
          ? "typed"
          : "";
    return {
      token,
      note,
      box,
      pick: token.top ? (other) => this.page.pick(index, other) : null,
      onShow: () => paintToken(editor, from, from + token.text.length),
      onHide: () => paintToken(editor, 0, 0),
      back: () => editor.focus(),
    };
  }

  #open(index, pinned) {
    const { doc } = this.page;
    if (!isToken(doc.pieces[index])) return;
    this.at = index;
    this.popover.show(this.#keyOf(index), this.#what(index), { pinned });
    this.#uncover();
    const token = doc.pieces[index];
    const chance = token.logprob === undefined ? "not scored" : percent(token.logprob);
    announce(`${visible(token.name ?? token.text)}, ${chance}`);
  }

  /* On a phone the popover covers the lower part of the text. */
  #uncover() {
    const { box } = this.popover.shown.what;
    const { top, left } = this.popover.element.getBoundingClientRect();
    if (left === 0 && box.bottom > top - ROOM_PX) {
      const before = $("scroller").scrollTop;
      $("scroller").scrollTop += box.bottom - top + ROOM_PX;
      this.moving = $("scroller").scrollTop !== before;
    }
  }

  #follow() {
    if (this.moving) {
      this.moving = false;
      return;
    }
    if (!this.popover.open) return;
    if (this.popover.pinned && this.on && this.at >= 0) this.#open(this.at, true);
    else this.popover.hide();
  }

  toggle(on = !this.on) {
    if (this.page.writer.running) return;
    this.on = on;
    $("tokens").setAttribute("aria-pressed", String(on));
    this.page.editor.setEditable(!on);
    this.page.refresh();
    this.popover.hide();
    this.page.editor.element.focus({ preventScroll: true });
    if (!on) {
      this.page.editor.focus();
      return;
    }
    const { doc, editor } = this.page;
    const under = pieceAt(starts(doc.pieces), doc.pieces, Math.max(0, editor.selection.end - 1));
    this.at = under < 0 ? doc.pieces.length : under;
    if (isToken(doc.pieces[this.at])) this.#open(this.at, true);
    else this.#step(-1) || this.#step(1);
  }

  #step(direction) {
    const { pieces } = this.page.doc;
    let next = this.at + direction;
    while (next >= 0 && next < pieces.length && !isToken(pieces[next])) next += direction;
    if (!isToken(pieces[next])) return false;
    this.#open(next, true);
    const box = this.#what(next).box;
    const frame = $("scroller").getBoundingClientRect();
    if (box.bottom > frame.bottom - 20 || box.top < frame.top + 20)
      $("scroller").scrollTop += box.top - (frame.top + frame.bottom) / 2;
    return true;
  }

  #key(event) {
    if (event.key === "Escape" && this.popover.open && !this.on) {
      this.popover.hide();
    } else if (
      !this.on ||
      event.altKey ||
      event.ctrlKey ||
      event.metaKey ||
      event.target.closest("input, textarea, dialog")
    ) {
      return;
    } else if (event.key === "Escape") {
      this.toggle(false);
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      this.#step(event.key === "ArrowRight" ? 1 : -1);
    } else if (
      (event.key === "ArrowDown" || event.key === "Enter") &&
      this.popover.open &&
      !event.target.closest("#popover, button")
    ) {
      this.popover.focusRow(0);
    } else {
      return;
    }
    event.preventDefault();
  }
}
