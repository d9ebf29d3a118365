/* The token ids of a text: those of tokens as they were drawn, typed text through the server. */

import { scoredText } from "./answer.js";
import { tokenise } from "./api.js";

const isDrawnToken = (piece) => piece.run !== undefined && piece.id !== undefined;

/* Neighbouring pieces of one kind: drawn tokens, or text that is tokenised as a whole. */
function stretches(pieces) {
  const result = [];
  for (const piece of pieces) {
    if (piece.end) continue;
    const drawn = isDrawnToken(piece);
    const last = result[result.length - 1];
    if (last?.drawn === drawn) last.pieces.push(piece);
    else result.push({ drawn, pieces: [piece] });
  }
  return result;
}

/* Typed text that was cut into tokens keeps their ids only while all of it is unchanged. */
async function idsOf({ drawn, pieces }, isFirst, facts, signal) {
  const known = drawn || pieces.every((piece) => piece.id !== undefined);
  if (known) return pieces.map((piece) => piece.id);
  const text = pieces.map((piece) => piece.text).join("");
  return facts.prefixed && !isFirst ? tokeniseInside(text, signal) : tokenise(text, false, signal);
}

/* For tokenizers that put a space before a text: ids of text that has other text before it. */
async function tokeniseInside(text, signal) {
  const line = await tokenise("\n", false, signal);
  const after = await tokenise(`\n${text}`, false, signal);
  const apart = line.every((id, place) => after[place] === id);
  return apart ? after.slice(line.length) : tokenise(text, false, signal);
}

/* The ids to send: `ids`, the first `numBegin` of which begin every text, and `parts`: how many
   ids each stretch of the text has. */
export async function promptOf(pieces, facts, signal) {
  const begin = await tokenise("", true, signal);
  const parts = [];
  const ids = [...begin];
  for (const stretch of stretches(pieces)) {
    const own = await idsOf(stretch, !parts.length, facts, signal);
    parts.push({ ...stretch, count: own.length });
    ids.push(...own);
  }
  if (ids.length || !facts.endToken) return { ids, numBegin: begin.length, parts };
  // From nothing: a text begins where another one ended.
  return { ids: await tokenise(facts.endToken, false, signal), numBegin: 1, parts };
}

/* The same text with the scores of `tokens`, which answer a prompt of these parts. */
export function withScores(parts, tokens, end, facts) {
  const result = [];
  let at = 0;
  if (facts.prefixed && parts[0] && !parts[0].drawn && tokens[0]?.text.startsWith(" ")) {
    tokens = [{ ...tokens[0], text: tokens[0].text.slice(1) }, ...tokens.slice(1)];
  }
  for (const { drawn, pieces, count } of parts) {
    const own = tokens.slice(at, at + count);
    at += count;
    if (drawn) {
      pieces.forEach(({ stale, ...piece }, index) => {
        result.push({ ...piece, logprob: own[index].logprob, top: own[index].top });
      });
    } else if (pieces.some((piece) => piece.run !== undefined)) {
      result.push(...pieces);
    } else {
      const text = pieces.map((piece) => piece.text).join("");
      result.push(...(scoredText(text, own) ?? [{ text }]));
    }
  }
  return end ? [...result, end] : result;
}
