/* Keyboard shortcuts: their names, and what they do to the completion page. */

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

/* Alt with arrows moves by words on a Mac, so brackets do there what arrows do elsewhere. */
export const KEYS = [
  ["Mod+Enter", "Continue the text"],
  ["Esc", "Stop"],
  ["Mod+Shift+Enter", "Retry: draw again from the same place, as a new branch"],
  ["Alt+Enter", "Branch here: cut after the caret and continue from there"],
  ["Mod+Z", "Undo, drawn text as well"],
  [isMac ? "Mod+Shift+Z" : "Mod+Y", "Redo"],
  [isMac ? "Alt+[  Alt+]" : "Alt+←  Alt+→", "Previous and next branch"],
  [
    isMac ? "Alt+Shift+[  Alt+Shift+]" : "Alt+↑  Alt+↓",
    "The place before or after, where branches part",
  ],
  ["Alt+T", "Tokens: ← → walk, ↓ chooses among alternatives, Enter takes one"],
  ["Alt+H", "Surprise: colour tokens by their probability"],
  ["Alt+P", "Score all text"],
  ["Alt+C", "This request as code"],
  ["Enter", "In a chat: send; with Shift a new line"],
  ["Mod+/", "This help"],
];

export function keyNames(keys) {
  const names = isMac
    ? { Mod: "⌘", Alt: "⌥", Shift: "⇧", Enter: "↵" }
    : { Mod: "Ctrl", Enter: "↵" };
  return keys
    .replace(/Mod|Alt|Shift|Enter/g, (key) => names[key] ?? key)
    .replaceAll("+", isMac ? "" : " ");
}

/* A shortcut such as "Mod+Shift+Enter"; keys by their place on the keyboard. */
export function pressed(event, keys) {
  const parts = keys.split("+");
  const code = parts.pop();
  const mod = isMac ? event.metaKey : event.ctrlKey;
  const wants = (name) => parts.includes(name);
  return (
    event.code === code &&
    mod === wants("Mod") &&
    event.altKey === wants("Alt") &&
    event.shiftKey === wants("Shift")
  );
}

/* Keys by their place on the keyboard, and what they do. */
export function shortcuts(page) {
  const turns = isMac
    ? ["Alt+BracketLeft", "Alt+BracketRight", "Alt+Shift+BracketLeft", "Alt+Shift+BracketRight"]
    : ["Alt+ArrowLeft", "Alt+ArrowRight", "Alt+ArrowUp", "Alt+ArrowDown"];
  return [
    ["Mod+Enter", () => page.continue()],
    ["Mod+Shift+Enter", () => page.retry()],
    ["Alt+Enter", () => page.branchHere()],
    ["Mod+KeyZ", () => page.undo()],
    ["Mod+Shift+KeyZ", () => page.redo()],
    ["Mod+KeyY", () => page.redo()],
    ["Alt+KeyT", () => page.view.toggle()],
    ["Alt+KeyH", () => page.toggleSurprise()],
    ["Alt+KeyP", () => page.score()],
    ["Alt+KeyC", () => page.share()],
    [turns[0], () => page.turn(-1)],
    [turns[1], () => page.turn(1)],
    [turns[2], () => page.branches.walk(-1)],
    [turns[3], () => page.branches.walk(1)],
  ];
}
