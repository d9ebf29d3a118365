/* Figures in words. No DOM here. */

const thousands = (number) => number.toLocaleString("en-US");

export function finishWords({ finishReason, settings }) {
  if (finishReason === "length")
    return settings.max_tokens ? "max tokens reached" : "the context is full";
  if (finishReason === "stop") return settings.stop.length ? "ended" : "ended by itself";
  return finishReason ? null : "stopped";
}

export function statusWords(figures, running, numTokens, maxContext) {
  const words = [];
  const { tokensPerSecond, firstTokenSeconds, cachedTokens, seed, finish } = figures;
  if (running && !figures.numTokens) words.push("reading the text…");
  const speed = tokensPerSecond
    ? ` at ${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`
    : "";
  if (figures.numTokens) words.push(`drew ${thousands(figures.numTokens)}${speed}`);
  if (firstTokenSeconds !== null && firstTokenSeconds !== undefined)
    words.push(`first in ${seconds(firstTokenSeconds)}`);
  if (cachedTokens) words.push(`${thousands(cachedTokens)} from cache`);
  if (seed !== undefined) words.push(`seed ${seed}`);
  if (finish) words.push(finish);
  if (figures.hint) words.push(figures.hint);
  if (numTokens !== undefined)
    words.push(
      maxContext
        ? `${thousands(numTokens)} of ${thousands(maxContext)} tokens`
        : `${thousands(numTokens)} tokens`,
    );
  return words.join("  ·  ");
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}

/* Mean surprise of the tokens that have a score. */
export function meanWords(pieces) {
  const scored = pieces.filter((piece) => piece.logprob !== undefined && !piece.stale);
  if (!scored.length) return "";
  const mean = scored.reduce((sum, piece) => sum - piece.logprob, 0) / scored.length;
  return `mean ${mean.toFixed(2)} nats a token over ${thousands(scored.length)}`;
}
