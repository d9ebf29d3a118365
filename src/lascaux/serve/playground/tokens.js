/* The popover that shows a token, its probability and its alternatives. */

const MOST_SHOWN = 8;
const SHOW_DELAY_MS = 280;
const HIDE_DELAY_MS = 260;

const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
const codePoint = (letter) =>
  `⟨${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

/* A token's text with its white space, and what else has no shape, made visible. */
export function visible(name) {
  const lines = name.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  const shown = lines.replace(UNSEEN, codePoint);
  return shown.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";
}

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return "100 %";
  if (value >= 0.1) return `${value.toFixed(1)} %`;
  return value >= 0.001 ? `${value.toFixed(3)} %` : "< 0.001 %";
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

/* The likeliest alternatives, and the token itself when it is not among them. */
function rows(token) {
  const list = (token.top ?? []).slice(0, MOST_SHOWN);
  const own = (other) =>
    token.id === undefined ? other.name === token.name : other.id === token.id;
  if (!list.some(own) && token.logprob !== undefined) {
    list.push({ id: token.id, name: token.name, logprob: token.logprob });
  }
  return list.map((other) => ({ ...other, own: own(other) }));
}

export class TokenPopover {
  /* `pick(token, alternative)` when an alternative is chosen; absent: for reading only. */
  constructor(element) {
    this.element = element;
    this.shown = null;
    this.timer = 0;
    element.addEventListener("pointerenter", () => clearTimeout(this.timer));
    element.addEventListener("pointerleave", () => this.hideSoon());
    element.addEventListener("click", (event) => this.#click(event));
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  get open() {
    return !this.element.hidden;
  }

  showSoon(key, build) {
    if (this.shown?.key === key) {
      clearTimeout(this.timer);
      return;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.show(key, build()), this.open ? 40 : SHOW_DELAY_MS);
  }

  hideSoon() {
    clearTimeout(this.timer);
    if (this.pinned) return;
    this.timer = setTimeout(() => this.hide(), HIDE_DELAY_MS);
  }

  /* `what`: {token, note, box, pick, onHide, back}. `box`: where the token stands on screen. */
  show(key, what, { pinned = false } = {}) {
    clearTimeout(this.timer);
    this.shown?.what.onHide?.();
    this.shown = { key, what, rows: rows(what.token) };
    this.pinned = pinned;
    this.element.replaceChildren(...this.#content());
    this.element.hidden = false;
    this.#place(what.box);
    what.onShow?.();
  }

  hide() {
    clearTimeout(this.timer);
    if (!this.shown) return;
    const { what } = this.shown;
    const hadFocus = this.element.contains(document.activeElement);
    this.shown = null;
    this.pinned = false;
    this.element.hidden = true;
    what.onHide?.();
    if (hadFocus) what.back?.();
  }

  #content() {
    const { what, rows: list } = this.shown;
    const { token, note, pick } = what;
    const header = make("header");
    header.append(make("code", "", visible(token.name ?? token.text)));
    if (token.logprob !== undefined) header.append(make("b", "", percent(token.logprob)));
    if (this.pinned) header.append(this.#closeButton());
    const facts = [];
    if (token.id !== undefined) facts.push(`id ${token.id}`);
    if (token.logprob !== undefined)
      facts.push(`${token.logprob.toFixed(3).replace("-", "−")} nats`);
    const place = list.findIndex((row) => row.own);
    if (place >= 0 && token.top)
      facts.push(place < MOST_SHOWN ? `rank ${place + 1}` : `beyond rank ${MOST_SHOWN}`);
    if (note) facts.push(note);
    const ordered = make("ol");
    list.forEach((row, index) => ordered.append(this.#row(row, index, Boolean(pick))));
    return [header, make("p", "facts", facts.join(" · ")), ordered];
  }

  #closeButton() {
    const button = make("button", "quiet icon", "×");
    button.type = "button";
    button.setAttribute("aria-label", "Close");
    button.addEventListener("click", () => this.hide());
    return button;
  }

  #row(row, index, canPick) {
    const item = make("li");
    const button = make("button", row.own ? "own" : "");
    button.type = "button";
    button.dataset.row = String(index);
    button.disabled = !canPick;
    const chance = percent(row.logprob);
    button.setAttribute(
      "aria-label",
      `${visible(row.name)}, ${chance}${row.own ? ", the token drawn" : ""}`,
    );
    const fill = make("span", "fill");
    fill.style.width = `${Math.min(100, 100 * Math.exp(row.logprob)).toFixed(2)}%`;
    button.append(fill, make("code", "", visible(row.name)), make("span", "", chance));
    item.append(button);
    return item;
  }

  #place(box) {
    const { style } = this.element;
    const { width, height } = this.element.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left - 12, innerWidth - width - 8));
    const below = box.bottom + 6;
    const fits = below + height <= innerHeight - 8 || box.top <= height + 14;
    style.left = `${left}px`;
    style.top = `${fits ? below : box.top - height - 6}px`;
  }

  #click(event) {
    const button = event.target.closest("button[data-row]");
    if (button) this.choose(Number(button.dataset.row));
  }

  choose(index) {
    const { what, rows: list } = this.shown;
    const row = list[index];
    this.hide();
    if (what.pick && row) what.pick(row);
  }

  focusRow(index) {
    const buttons = [...this.element.querySelectorAll("button[data-row]")];
    buttons[Math.max(0, Math.min(index, buttons.length - 1))]?.focus();
  }

  #key(event) {
    const index = Number(event.target.dataset?.row ?? 0);
    if (event.key === "ArrowDown") this.focusRow(index + 1);
    else if (event.key === "ArrowUp" && index === 0) this.shown?.what.back?.();
    else if (event.key === "ArrowUp") this.focusRow(index - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
