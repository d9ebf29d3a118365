/* An answer as it arrives, as pieces: each token with the text it shows. No DOM here. */

const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/i;
const encoder = new TextEncoder();
const newDecoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

/* The bytes a token stands for; tokens that are not whole characters are named bytes:\xNN…. */
function bytesOf(name) {
  const match = BYTES.exec(name);
  if (!match) return encoder.encode(name);
  return Uint8Array.from(match[1].slice(2).split("\\x"), (hex) => parseInt(hex, 16));
}

const isPartOfCharacter = (piece) => BYTES.test(piece.name ?? "");

/* Tokens at the end of `pieces` that have begun a character. */
function begun(pieces) {
  let first = pieces.length;
  while (first && !pieces[first - 1].text && isPartOfCharacter(pieces[first - 1])) first--;
  return pieces.slice(first);
}

/* The text a token shows when it comes after `pieces`, which may end inside a character. */
export function textAfter(pieces, name) {
  const decoder = newDecoder();
  for (const piece of begun(pieces)) decoder.decode(bytesOf(piece.name), { stream: true });
  return decoder.decode(bytesOf(name), { stream: true });
}

function mayBeCompleted(pieces, token) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  try {
    return [...begun(pieces), token].every(
      ({ name }) => !decoder.decode(bytesOf(name), { stream: true }),
    );
  } catch {
    return false;
  }
}

/* The tokens of a choice of the completions API: what each adds to the text, its id, its name. */
export function completionTokens({ logprobs, token_ids, prompt_token_ids }, withPrompt = false) {
  if (!logprobs) return [];
  const ids = logprobs.token_ids ?? [
    ...(withPrompt ? (prompt_token_ids ?? []) : []),
    ...(token_ids ?? []),
  ];
  return logprobs.tokens.map((text, index) => {
    const id = ids[index];
    const top = Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([name, logprob]) => ({
      id: logprobs.top_token_ids?.[index]?.[name] ?? (name === text ? id : undefined),
      name,
      logprob,
    }));
    top.sort((a, b) => b.logprob - a.logprob);
    const logprob = logprobs.token_logprobs?.[index] ?? undefined;
    const name = nameOf(text, id, logprob, top);
    return { text, id, name, logprob, top: top.length ? top : undefined };
  });
}

/* A token that adds nothing has its name among the likeliest tokens, where the server puts it. */
function nameOf(text, id, logprob, top) {
  const own =
    top.find((other) => other.id !== undefined && other.id === id) ??
    (text ? undefined : top.find((other) => other.id === undefined && other.logprob === logprob));
  return own?.name ?? text;
}

/* The tokens of a choice of the chat API; `decoder` has seen the bytes of the tokens before. */
function chatTokens({ logprobs, token_ids }, decoder) {
  return (logprobs?.content ?? []).map((entry, index) => ({
    text: entry.bytes ? decoder.decode(Uint8Array.from(entry.bytes), { stream: true }) : "",
    id: entry.id ?? token_ids?.[index],
    name: entry.token,
    logprob: entry.logprob,
    top: (entry.top_logprobs ?? []).map(({ id, token, logprob }) => ({ id, name: token, logprob })),
  }));
}

/* Lays tokens over a text, as far as both have come. */
class Alignment {
  constructor() {
    this.pieces = [];
    this.shown = 0;
    this.waiting = [];
  }

  advance(whole) {
    while (this.waiting.length && whole.startsWith(this.waiting[0].text, this.shown)) {
      const token = this.waiting.shift();
      this.pieces.push(token);
      this.shown += token.text.length;
    }
  }
}

/* What one choice has drawn so far. */
export class Answer {
  /* `first`: the number of the run's first piece to come. */
  constructor(run, first = 0) {
    this.run = run;
    this.first = first;
    this.text = "";
    this.numTokens = 0;
    this.finishReason = null;
    this.promptIds = null;
    this.decoder = newDecoder();
    this.alignment = new Alignment();
  }

  feed(choice) {
    this.text += choice.text ?? choice.delta?.content ?? "";
    const tokens = choice.delta ? chatTokens(choice, this.decoder) : completionTokens(choice);
    this.alignment.waiting.push(...tokens);
    this.numTokens += tokens.length;
    this.promptIds ??= choice.prompt_token_ids ?? null;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    this.alignment.advance(this.text);
  }

  /* Tokens of a stop string that was cut out are not among them; text without a token is what was
     left of such a token. */
  pieces() {
    const drawn = this.alignment.pieces.slice();
    const { shown } = this.alignment;
    const last = drawn[drawn.length - 1];
    if (shown < this.text.length) drawn.push({ text: this.text.slice(shown) });
    else if (last && this.finishReason) drawn[drawn.length - 1] = this.#ended(last);
    return drawn.map((piece, index) => ({ ...piece, run: this.run, at: this.first + index }));
  }

  #ended(last) {
    const before = this.alignment.pieces.slice(0, -1);
    // The server closes a character that is not complete; the next tokens may still complete it.
    if (last.text === "\ufffd" && mayBeCompleted(before, last)) return { ...last, text: "" };
    const silent = !last.text && last.name && !isPartOfCharacter(last);
    return silent && this.finishReason === "stop" ? { ...last, end: true } : last;
  }
}

/* The pieces of a typed stretch, cut into the tokens the model reads and scored; null where the
   tokens do not give its text. */
export function scoredText(text, tokens) {
  const alignment = new Alignment();
  alignment.waiting.push(...tokens);
  alignment.advance(text);
  return alignment.shown === text.length && !alignment.waiting.length ? alignment.pieces : null;
}
