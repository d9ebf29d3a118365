/* What is painted over a text: who wrote it, how surprising it was, which token is looked at. */

import { starts } from "./pieces.js";

const HEAT_LEVELS = 8;
export const canPaint = Boolean(globalThis.CSS?.highlights && globalThis.Highlight);

/* Surprise in whole nats, 7 for all beyond. */
function heatLevel(logprob) {
  return Math.max(0, Math.min(HEAT_LEVELS - 1, Math.floor(-logprob)));
}

function paint(name, ranges) {
  if (!canPaint) return;
  if (ranges.length) CSS.highlights.set(name, new Highlight(...ranges));
  else CSS.highlights.delete(name);
}

/* Neighbouring pieces for which `label` gives the same, as [label, start, end]; null: none. */
function stretchesBy(pieces, label) {
  const result = [];
  let at = 0;
  pieces.forEach((piece, index) => {
    const from = at;
    at += piece.text.length;
    const name = label(piece, index);
    if (name === null || from === at) return;
    const last = result[result.length - 1];
    if (last && last[0] === name && last[2] === from) last[2] = at;
    else result.push([name, from, at]);
  });
  return result;
}

const LABELS = {
  origin: (piece) => (piece.run === undefined ? null : "drawn"),
  tokens: (piece, index) => (piece.id === undefined ? null : index % 2 ? "drawn" : "other"),
  surprise: (piece) =>
    piece.logprob === undefined || piece.stale ? null : `heat-${heatLevel(piece.logprob)}`,
};
const NAMES = [
  "drawn",
  "other",
  ...Array.from({ length: HEAT_LEVELS }, (_, level) => `heat-${level}`),
];

/* Tints the text by "origin", "tokens" (one and the next apart) or "surprise". */
export function paintText(editor, pieces, by) {
  const ranges = Object.fromEntries(NAMES.map((name) => [name, []]));
  for (const [name, start, end] of stretchesBy(pieces, LABELS[by]))
    ranges[name].push(editor.rangeOf(start, end));
  for (const name of NAMES) paint(name, ranges[name]);
}

export function paintToken(editor, start, end) {
  paint("token", start < end ? [editor.rangeOf(start, end)] : []);
}

/* The place of an offset in the sheet, for marks beside the text: {top, left, height}. */
export function placeOf(editor, sheet, offset) {
  const range = editor.rangeOf(Math.max(0, offset - 1), offset);
  const boxes = range.getClientRects();
  const frame = sheet.getBoundingClientRect();
  const box = boxes[boxes.length - 1] ?? editor.element.getBoundingClientRect();
  const line = parseFloat(getComputedStyle(editor.element).lineHeight);
  const atStart = !boxes.length;
  const newLine = editor.text[offset - 1] === "\n";
  return {
    top: box.top - frame.top + (newLine ? line : 0),
    left:
      (atStart || newLine ? editor.element.getBoundingClientRect().left : box.right) - frame.left,
    height: atStart ? line : box.height,
  };
}

/* Marks for tokens that show no text: the end of a text, special tokens. */
export function placeMarks(container, editor, sheet, pieces) {
  const begins = starts(pieces);
  const marks = [];
  pieces.forEach((piece, index) => {
    if (piece.text || !piece.name || piece.name.startsWith("bytes:")) return;
    const mark = document.createElement("i");
    const { top, left, height } = placeOf(editor, sheet, begins[index]);
    mark.className = piece.end ? "end" : "tick";
    if (piece.end) mark.textContent = "end of text";
    else mark.title = piece.name;
    mark.dataset.index = String(index);
    mark.style.top = `${top + (piece.end ? (height - 22) / 2 : 0)}px`;
    mark.style.left = `${left + (piece.end ? 8 : 0)}px`;
    marks.push(mark);
  });
  container.replaceChildren(...marks);
}
