/* The menu of texts: new, earlier ones, to a file and back. */

import { $, say } from "./shell.js";
import { decodeDocument, encodeDocument } from "./saved.js";
import { titleOf } from "./store.js";

const MOST_LISTED = 12;

function item(label, action, detail) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "menuitem");
  const text = document.createElement("span");
  text.textContent = label;
  button.append(text);
  if (detail) {
    const small = document.createElement("small");
    small.textContent = detail;
    button.append(small);
  }
  button.addEventListener("click", () => {
    close();
    action();
  });
  return button;
}

function ago(time) {
  const minutes = Math.round((Date.now() - time) / 60000);
  if (minutes < 1) return "now";
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.round(minutes / 60)} h`;
  return `${Math.round(minutes / 1440)} d`;
}

const FACE = "lascaux.face";

/* Prose or code: the letters of the text. */
function setFace(face) {
  document.documentElement.dataset.face = face;
  try {
    localStorage.setItem(FACE, face);
  } catch {
    // Not remembered, then.
  }
}

function restoreFace() {
  try {
    document.documentElement.dataset.face = localStorage.getItem(FACE) ?? "prose";
  } catch {
    document.documentElement.dataset.face = "prose";
  }
}

function close() {
  $("documents-menu").hidden = true;
  $("documents").setAttribute("aria-expanded", "false");
}

function save(doc) {
  const data = new Blob([JSON.stringify(encodeDocument(doc))], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(data);
  link.download = `${
    titleOf(doc)
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .slice(0, 40) || "text"
  }.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export function setUpTexts(page, store) {
  restoreFace();

  /* From the text on show to another one. */
  async function change(next) {
    await page.halt();
    store.save(page.doc);
    page.show(next());
  }
  async function load(file) {
    try {
      const doc = decodeDocument(JSON.parse(await file.text()));
      await change(() => {
        store.create();
        return doc;
      });
    } catch (error) {
      say($("message"), `${file.name} cannot be read: ${error.message}`);
    }
  }

  function entries() {
    const rule = () => document.createElement("hr");
    const others = store
      .list()
      .filter(({ id }) => id !== store.id)
      .slice(0, MOST_LISTED);
    const face = document.documentElement.dataset.face === "code" ? "prose" : "code";
    const list = [
      item("New text", () => change(() => store.create())),
      item("Export as JSON", () => save(page.doc)),
      item("Import…", () => $("import-file").click()),
      item(face === "code" ? "Show in monospace" : "Show as prose", () => {
        setFace(face);
        page.refresh();
      }),
      item("Delete this text", () => {
        if (!confirm("Delete this text and all of its branches?")) return;
        change(() => {
          store.remove(store.id);
          return store.create();
        });
      }),
    ];
    if (others.length) list.push(rule());
    for (const { id, title, time } of others) {
      list.push(item(title, () => change(() => store.open(id)), ago(time)));
    }
    return list;
  }

  $("documents").addEventListener("click", () => {
    if (!$("documents-menu").hidden) return close();
    store.save(page.doc);
    $("documents-menu").replaceChildren(...entries());
    $("documents-menu").hidden = false;
    $("documents").setAttribute("aria-expanded", "true");
    $("documents-menu").querySelector("button").focus();
  });
  $("documents-menu").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...$("documents-menu").querySelectorAll("button")];
    if (step)
      buttons[
        (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length
      ].focus();
    else if (event.key === "Escape") {
      close();
      $("documents").focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".menu")) close();
  });
  document.addEventListener("dragover", (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();
    load(file);
  });
  $("import-file").addEventListener("change", () => {
    const [file] = $("import-file").files;
    if (file) load(file);
    $("import-file").value = "";
  });
}
