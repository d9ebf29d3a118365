/* What both ways of working share: messages, dialogs, theme, keys, tabs. */

import { hasKey, onMissingKey } from "./api.js";
import { KEYS, keyNames, pressed } from "./keys.js";
import { asCurl, asPython } from "./share.js";

export const $ = (id) => document.getElementById(id);

const THEMES = ["system", "light", "dark"];
const SIGNS = { system: "◐", light: "○", dark: "●" };

/* Shows a message in place, with what can be done about it; null takes it away. */
export function say(box, message, action) {
  box.hidden = !message;
  box.replaceChildren();
  if (!message) return;
  const text = document.createElement("span");
  text.textContent = message;
  box.append(text);
  if (action) {
    const button = document.createElement("button");
    button.textContent = action.label;
    button.addEventListener("click", () => {
      say(box, null);
      action.run();
    });
    box.append(button);
  }
  const close = document.createElement("button");
  close.className = "quiet icon";
  close.textContent = "×";
  close.setAttribute("aria-label", "Close the message");
  close.addEventListener("click", () => say(box, null));
  box.append(close);
}

export function announce(text) {
  $("announce").textContent = text;
}

export function setUpKeyDialog() {
  let waiting = null;
  onMissingKey((reason) => {
    waiting ??= new Promise((resolve) => {
      $("key-reason").textContent = reason;
      $("key").value = "";
      $("key-sheet").returnValue = "";
      $("key-sheet").showModal();
      $("key-sheet").addEventListener(
        "close",
        () => {
          waiting = null;
          resolve($("key-sheet").returnValue === "use" ? $("key").value.trim() : null);
        },
        { once: true },
      );
    });
    return waiting;
  });
  $("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    $("key-sheet").close("use");
  });
}

export function setUpTheme() {
  const root = document.documentElement;
  const show = () => {
    const theme = root.dataset.theme ?? "system";
    $("theme").textContent = SIGNS[theme];
    $("theme").title = `Theme: ${theme === "system" ? "as the system" : theme}`;
    $("theme").setAttribute("aria-label", $("theme").title);
  };
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("lascaux.theme", next);
    } catch {
      // Not remembered, then.
    }
    show();
  });
  show();
}

export function setUpHelp() {
  for (const [keys, words] of KEYS) {
    const [term, meaning] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = keyNames(keys);
    meaning.textContent = words;
    $("keys").append(term, meaning);
  }
  for (const label of document.querySelectorAll("kbd[data-keys]"))
    label.textContent = keyNames(label.dataset.keys);
  const open = () => $("help-sheet").open || $("help-sheet").showModal();
  $("help").addEventListener("click", open);
  document.addEventListener("keydown", (event) => {
    const writing =
      event.target.isContentEditable || /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
    if (!pressed(event, "Mod+Slash") && (event.key !== "?" || writing)) return;
    event.preventDefault();
    open();
  });
}

export function setUpPanel() {
  const turn = (open) => {
    $("panel").classList.toggle("open", open);
    $("toggle-panel").setAttribute("aria-expanded", String(open));
  };
  $("toggle-panel").addEventListener("click", () => turn(!$("panel").classList.contains("open")));
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#panel, #toggle-panel")) turn(false);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") turn(false);
  });
}

/* `shown(name)` after a change of tabs. */
export function setUpTabs(shown) {
  const tabs = [$("tab-complete"), $("tab-chat")];
  const select = (tab) => {
    for (const each of tabs) {
      const on = each === tab;
      each.setAttribute("aria-selected", String(on));
      each.tabIndex = on ? 0 : -1;
      $(each.getAttribute("aria-controls")).hidden = !on;
    }
    const name = tab.getAttribute("aria-controls");
    $("branches-box").hidden = name !== "complete";
    document.body.dataset.tab = name;
    history.replaceState(null, "", name === "chat" ? "#chat" : location.pathname);
    shown(name);
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = tabs[1 - tabs.indexOf(tab)];
      other.focus();
      select(other);
    });
  }
  select(location.hash === "#chat" ? tabs[1] : tabs[0]);
}

let shared = null;

function showCode() {
  const python = $("as-python").getAttribute("aria-selected") === "true";
  const write = python ? asPython : asCurl;
  $("code").textContent = write(location.origin, shared.path, shared.body, hasKey());
}

/* `request`: {path, body, note}. */
export function openShare(request) {
  shared = request;
  $("share-note").textContent = request.note ?? "";
  $("copy-code").textContent = "Copy";
  showCode();
  $("share-sheet").showModal();
}

export function setUpShare() {
  const languages = [$("as-curl"), $("as-python")];
  for (const tab of languages) {
    tab.addEventListener("click", () => {
      for (const each of languages) each.setAttribute("aria-selected", String(each === tab));
      showCode();
    });
  }
  $("copy-code").addEventListener("click", async () => {
    $("copy-code").textContent = (await copied($("code"))) ? "Copied" : "Press Ctrl C";
  });
}

/* Selects as well, for pages served without TLS, where browsers give no clipboard. */
async function copied(element) {
  getSelection().selectAllChildren(element);
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    return document.execCommand("copy");
  }
}
