/* The messages of a conversation on the page, and the tokens of the model's. */

import { offsetIn, rangeIn } from "./editor.js";
import { pieceAt, starts } from "./pieces.js";
import { $ } from "./shell.js";

const SPEAKERS = { user: "You", assistant: "Model" };

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, label, action) {
  const made = make("button", "quiet", text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

export class TalkView {
  /* `chat` has conversation, job, edit, retry, turn, show and pick. */
  constructor(list, chat, popover) {
    this.list = list;
    this.chat = chat;
    this.popover = popover;
    this.texts = new Map();
    list.classList.add("messages");
    list.addEventListener("pointermove", (event) => this.#hover(event));
    list.addEventListener("pointerleave", () => popover.hideSoon());
    list.addEventListener("click", (event) => this.#tap(event));
  }

  draw() {
    const { conversation } = this.chat;
    const { shown } = conversation;
    this.texts.clear();
    this.popover.hide();
    if (shown.length) this.list.replaceChildren(...shown.map((node) => this.#message(node)));
    else this.list.replaceChildren(...this.#beginnings());
    this.#toEnd();
  }

  /* The message the model is writing has grown. */
  grow(node) {
    const text = this.texts.get(node.id);
    if (!text) return;
    const near =
      $("chat-scroller").scrollHeight -
        $("chat-scroller").scrollTop -
        $("chat-scroller").clientHeight <
      80;
    if (node.content.startsWith(text.data)) text.appendData(node.content.slice(text.data.length));
    else text.data = node.content;
    if (near) this.#toEnd();
  }

  #toEnd() {
    $("chat-scroller").scrollTop = $("chat-scroller").scrollHeight;
  }

  #beginnings() {
    const { earlier } = this.chat.conversation;
    const items = earlier.slice(0, 12).map((node) => {
      const item = make("li", "beginning");
      item.append(button(node.content.slice(0, 90), null, () => this.chat.show(node.id)));
      return item;
    });
    if (items.length) items.unshift(make("li", "heading", "Earlier chats"));
    return items;
  }

  #message(node) {
    const item = make("li", `turn ${node.role}`);
    item.append(make("div", "speaker", SPEAKERS[node.role]));
    const body = make("div", "body");
    const text = document.createTextNode(node.content);
    body.append(text);
    body.dataset.id = String(node.id);
    this.texts.set(node.id, text);
    item.append(body, this.#actions(node, item));
    return item;
  }

  #actions(node, item) {
    const { chat } = this;
    const row = make("div", "actions");
    const { index, count } = chat.conversation.siblings(node.id);
    if (count > 1) {
      row.append(
        button("‹", "Previous version", () => chat.turn(node.id, -1)),
        make("span", "number", `${index + 1}/${count}`),
        button("›", "Next version", () => chat.turn(node.id, 1)),
      );
    }
    if (chat.job?.node === node) return row;
    row.append(button("Edit", null, () => this.#edit(node, item)));
    if (node.role === "assistant") row.append(button("Retry", null, () => chat.retry(node.id)));
    return row;
  }

  #edit(node, item) {
    if (this.chat.job) return;
    const box = make("textarea", "rewrite");
    box.value = node.content;
    box.rows = Math.min(12, node.content.split("\n").length + 1);
    box.setAttribute("aria-label", "The message in other words");
    const use = () =>
      box.value === node.content ? this.draw() : this.chat.edit(node.id, box.value);
    const row = make("div", "actions");
    row.append(
      button(node.role === "user" ? "Send" : "Use", null, use),
      button("Cancel", null, () => this.draw()),
    );
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.draw();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) use();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    item.replaceChildren(item.firstChild, box, row);
    box.focus();
  }

  // Tokens

  #under(event) {
    const body = event.target.closest?.(".assistant .body");
    const node = body && this.chat.conversation.get(Number(body.dataset.id));
    if (!node?.pieces?.length || this.chat.job) return null;
    const offset = offsetIn(this.texts.get(node.id), event.clientX, event.clientY);
    const index = offset < 0 ? -1 : pieceAt(starts(node.pieces), node.pieces, offset);
    return node.pieces[index]?.id === undefined ? null : { node, index };
  }

  #hover(event) {
    if (event.pointerType === "touch" || event.buttons) return;
    const found = this.#under(event);
    if (!found) this.popover.hideSoon();
    else this.popover.showSoon(`${found.node.id}/${found.index}`, () => this.#what(found));
  }

  #tap(event) {
    const found = this.#under(event);
    if (found && getSelection().isCollapsed)
      this.popover.show(`${found.node.id}/${found.index}`, this.#what(found), { pinned: true });
  }

  #what({ node, index }) {
    const token = node.pieces[index];
    const from = starts(node.pieces)[index];
    const range = rangeIn(this.texts.get(node.id), from, from + token.text.length);
    const canPick =
      token.top &&
      node.promptIds &&
      node.pieces.slice(0, index).every((piece) => piece.id !== undefined);
    return {
      token,
      note: token.picked ? "picked" : "",
      box: range.getClientRects()[0] ?? range.getBoundingClientRect(),
      pick: canPick ? (other) => this.chat.pick(node.id, index, other) : null,
      onShow: () => globalThis.CSS?.highlights && CSS.highlights.set("token", new Highlight(range)),
      onHide: () => globalThis.CSS?.highlights && CSS.highlights.delete("token"),
      back: () => $("say").focus(),
    };
  }
}
