/* The server's API: requests, streams of events, errors in words, the key. */

const KEY = "lascaux.key";
const MOST_TOKENISED_TEXTS = 200;

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, param });
  }
}

let askForKey = async () => null;

/* `ask(message)` resolves to a key, or to null where the user gives none. */
export function onMissingKey(ask) {
  askForKey = ask;
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function rememberKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage may be forbidden; the key then has to be given again.
  }
}

export const hasKey = () => Boolean(storedKey());

function headers(key) {
  const common = { "Content-Type": "application/json" };
  return key ? { ...common, Authorization: `Bearer ${key}` } : common;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: the status line has to do.
  }
  const message = error.message ?? `the server answered ${response.status} ${response.statusText}`;
  return new ApiError(message, { status: response.status, code: error.code, param: error.param });
}

async function send(path, body, signal) {
  let key = storedKey();
  for (;;) {
    const options = body
      ? { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }
      : { headers: headers(key), signal };
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError("The server cannot be reached. Is `lascaux serve` still running?");
    }
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401) throw error;
    key = await askForKey(error.message);
    if (!key) throw error;
    rememberKey(key);
  }
}

export async function ask(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/* The JSON objects of a stream of server-sent events, until [DONE]. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("The connection ended before the answer was complete.");
      buffered = (buffered + value).replaceAll("\r\n", "\n");
      const events = buffered.split("\n\n");
      buffered = events.pop();
      for (const event of events) {
        const data = dataOf(event);
        if (data === "[DONE]") return;
        if (data) yield checked(JSON.parse(data));
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal?.aborted) throw error;
    throw new ApiError(`The connection broke off: ${error.message}`);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function checked(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.message ?? "the server gave up", chunk.error);
  return chunk;
}

/* What the page has to know of the model. */
export async function modelFacts() {
  const model = (await ask("/v1/models")).data[0];
  const tokens = await ask("/tokenizer_info");
  const there = await ask("/tokenize", { prompt: "x", add_special_tokens: false });
  const back = await ask("/detokenize", { tokens: there.tokens });
  return {
    name: model.id,
    maxContext: model.max_model_len ?? null,
    precision: model.precision ?? null,
    hasTemplate: Boolean(tokens.chat_template),
    endToken: tokens.eos_token ?? null,
    prefixed: back.prompt === " x", // the tokenizer puts a space before a text
    defaults: model.defaults ?? {},
  };
}

const tokenised = new Map();

/* Token ids of typed text; `begin`: with the ids that begin a text. Recent answers are kept. */
export async function tokenise(text, begin, signal) {
  const key = (begin ? "b" : "-") + text;
  let ids = tokenised.get(key);
  if (!ids) {
    ids = (await ask("/tokenize", { prompt: text, add_special_tokens: begin }, signal)).tokens;
    tokenised.set(key, ids);
    if (tokenised.size > MOST_TOKENISED_TEXTS) tokenised.delete(tokenised.keys().next().value);
  }
  return ids;
}
