/* Texts in the browser's storage: bounded, and never the reason that a text is lost. */

import { decodeDocument, encodeDocument } from "./saved.js";
import { TextDocument } from "./document.js";

const PREFIX = "lascaux.text.";
const CURRENT = "lascaux.current";
const MOST_TEXTS = 30;
const MOST_CHARS = 1_500_000; // of one text; browsers keep about 5 million for a site

const newId = () => Date.now().toString(36) + Math.floor(Math.random() * 36 ** 4).toString(36);

export function titleOf(doc) {
  const line = doc.text.slice(0, 200).trim().split("\n")[0];
  return line.slice(0, 48) || "Empty text";
}

export class Store {
  /* `warn(message)` when something cannot be kept. */
  constructor(warn) {
    this.warn = warn;
    this.id = null;
    this.written = null;
    this.warned = false;
  }

  /* The text this tab showed last, else the newest one, else an empty one. */
  open(id = this.#lastId()) {
    const doc = id ? this.#read(id) : null;
    this.id = doc ? id : newId();
    if (!doc) this.written = null;
    this.#point();
    return doc ?? new TextDocument();
  }

  create() {
    this.id = newId();
    this.written = null;
    this.#point();
    return new TextDocument();
  }

  /* [{id, title, time}], newest first. */
  list() {
    const found = [];
    try {
      for (const key of Object.keys(localStorage)) {
        if (!key.startsWith(PREFIX)) continue;
        const data = localStorage.getItem(key);
        const { title, time } = JSON.parse(`${data.slice(0, data.indexOf(',"saved":'))}}`);
        found.push({ id: key.slice(PREFIX.length), title, time });
      }
    } catch {
      return found;
    }
    return found.sort((a, b) => b.time - a.time);
  }

  remove(id) {
    localStorage.removeItem(PREFIX + id);
  }

  save(doc) {
    if (!doc.length && doc.tree.nodes.size === 1 && !this.written) return;
    try {
      if (localStorage.getItem(PREFIX + this.id) !== this.written) {
        this.id = newId(); // another tab has changed this text: keep both
        this.#point();
      }
      this.#write(doc);
    } catch (error) {
      if (this.warned) return;
      this.warned = true;
      this.warn(
        `The browser cannot keep this text (${error.name}): export it before you close the page.`,
      );
    }
  }

  #write(doc) {
    const wrap = (saved) => JSON.stringify({ title: titleOf(doc), time: Date.now(), saved });
    let data = wrap(encodeDocument(doc));
    if (data.length > MOST_CHARS) data = wrap(encodeDocument(doc, { scores: false }));
    for (const { id } of this.list()
      .filter((text) => text.id !== this.id)
      .slice(MOST_TEXTS - 1))
      this.remove(id);
    try {
      localStorage.setItem(PREFIX + this.id, data);
    } catch {
      data = wrap(encodeDocument(doc, { scores: false })); // alternatives take most of the room
      localStorage.setItem(PREFIX + this.id, data);
    }
    this.written = data;
    this.warned = false;
  }

  #read(id) {
    try {
      const data = localStorage.getItem(PREFIX + id);
      if (!data) return null;
      const doc = decodeDocument(JSON.parse(data).saved);
      this.written = data;
      return doc;
    } catch (error) {
      this.warn(`A text in this browser's storage cannot be read: ${error.message}`);
      return null;
    }
  }

  #lastId() {
    try {
      return sessionStorage.getItem(CURRENT) ?? this.list()[0]?.id ?? null;
    } catch {
      return null;
    }
  }

  #point() {
    try {
      sessionStorage.setItem(CURRENT, this.id);
    } catch {
      // Storage may be forbidden: save() says so when there is something to keep.
    }
  }
}
