/* A text as a sequence of pieces, each with its origin. Pure functions; pieces never change.

   A piece is {text} as typed, or a token {text, id, name, logprob, top, …} the model has scored.
   Drawn pieces also have {run, at}: number `at` of the run that drew them; `run` marks them as the
   model's. `top` is [{id, name, logprob}], likeliest first. A drawn piece without id is part of a
   token whose rest was cut off by a stop string. A token may show no text of its own: one that
   begins a character which later tokens complete, or a special token.
   `stale`: the text before it has changed since its probability was computed. */

export function textOf(pieces) {
  let text = "";
  for (const piece of pieces) text += piece.text;
  return text;
}

export function lengthOf(pieces) {
  let length = 0;
  for (const piece of pieces) length += piece.text.length;
  return length;
}

const isTyped = (piece) => piece.run === undefined;
const isPlain = (piece) => isTyped(piece) && piece.id === undefined;

function outdated(piece) {
  return isPlain(piece) || piece.stale ? piece : { ...piece, stale: true };
}

function push(pieces, piece) {
  const last = pieces[pieces.length - 1];
  if (last && isPlain(last) && isPlain(piece)) {
    pieces[pieces.length - 1] = { text: last.text + piece.text };
  } else if (piece.text || !isPlain(piece)) {
    pieces.push(piece);
  }
}

/* Replaces characters start…end by typed text. Tokens that are cut become typed text; tokens
   after the change stay, as stale. */
export function splice(pieces, start, end, inserted) {
  const result = [];
  let right = [];
  let head = "";
  let tail = "";
  let at = 0;
  for (const piece of pieces) {
    const from = at;
    at += piece.text.length;
    if (from < start && at <= start) {
      result.push(piece);
    } else if (from >= end) {
      right.push(piece);
    } else {
      head += piece.text.slice(0, Math.max(0, start - from));
      tail += piece.text.slice(Math.max(0, end - from));
    }
  }
  if (lengthOf(right) === 0) right = []; // an end of text, or half a character, that was typed over
  push(result, { text: head + inserted + tail });
  for (const piece of right) push(result, outdated(piece));
  return result;
}

/* The smallest change that turns one text into the other. A caret given as the place where typing
   ended decides between equal readings ("aa" → "aaa"). */
export function changeBetween(before, after, caret = after.length) {
  const longest = Math.min(before.length, after.length);
  let suffix = 0;
  const mostSuffix = Math.min(longest, after.length - caret);
  while (
    suffix < mostSuffix &&
    before[before.length - 1 - suffix] === after[after.length - 1 - suffix]
  )
    suffix++;
  let prefix = 0;
  while (prefix < longest - suffix && before[prefix] === after[prefix]) prefix++;
  while (
    suffix < longest - prefix &&
    before[before.length - 1 - suffix] === after[after.length - 1 - suffix]
  )
    suffix++;
  return {
    start: prefix,
    end: before.length - suffix,
    inserted: after.slice(prefix, after.length - suffix),
  };
}

/* How far two sequences are the same: whole pieces of each, and characters into the next one.
   Typed text is compared by its characters, drawn pieces by who drew them. */
export function commonPrefix(a, b) {
  let i = 0,
    j = 0,
    u = 0,
    v = 0;
  while (i < a.length && j < b.length) {
    const p = a[i],
      q = b[j];
    if (!isTyped(p) || !isTyped(q)) {
      if (u || v || p.run !== q.run || p.at !== q.at) break;
      i++;
      j++;
      continue;
    }
    while (u < p.text.length && v < q.text.length && p.text[u] === q.text[v]) {
      u++;
      v++;
    }
    const ended = u === p.text.length || v === q.text.length;
    if (!ended) {
      if (u && /[\ud800-\udbff]/.test(p.text[u - 1])) {
        u--;
        v--;
      }
      break;
    }
    if (u === p.text.length) {
      i++;
      u = 0;
    }
    if (v === q.text.length) {
      j++;
      v = 0;
    }
  }
  return { index: i, offset: u, otherIndex: j, otherOffset: v };
}

/* Two sequences that together are the one given: `index` pieces and `offset` characters, the rest. */
export function cut(pieces, index, offset) {
  if (!offset) return [pieces.slice(0, index), pieces.slice(index)];
  const { text } = pieces[index];
  return [
    [...pieces.slice(0, index), { text: text.slice(0, offset) }],
    [{ text: text.slice(offset) }, ...pieces.slice(index + 1)],
  ];
}

export function joined(a, b) {
  const result = a.slice();
  for (const piece of b) push(result, piece);
  return result;
}

/* Index of the piece that shows the character at `offset`; -1 beyond the end. */
export function pieceAt(starts, pieces, offset) {
  let low = 0,
    high = pieces.length - 1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    if (starts[middle] + pieces[middle].text.length <= offset) low = middle + 1;
    else if (starts[middle] > offset) high = middle - 1;
    else return middle;
  }
  return -1;
}

const startsOf = new WeakMap();

/* Where each piece begins, in characters. */
export function starts(pieces) {
  let known = startsOf.get(pieces);
  if (!known) {
    known = new Array(pieces.length);
    let at = 0;
    pieces.forEach((piece, index) => {
      known[index] = at;
      at += piece.text.length;
    });
    startsOf.set(pieces, known);
  }
  return known;
}
