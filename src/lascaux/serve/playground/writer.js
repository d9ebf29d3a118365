/* Draws continuations from the server into a document. */

import { Answer, completionTokens, textAfter } from "./answer.js";
import { ApiError, stream, ask } from "./api.js";
import { promptOf, withScores } from "./prompt.js";

export const TOP_LOGPROBS = 8;

export const newSeed = () => Math.floor(Math.random() * 2 ** 31);
export const newRun = () =>
  `${Date.now().toString(36)}${Math.floor(Math.random() * 36 ** 4).toString(36)}`;

/* The request for a prompt of ids, as it is sent and as it is shown to be copied. */
export function completionBody(facts, settings, ids, seed) {
  const { stop, ...rest } = settings;
  return {
    ...(facts.name && { model: facts.name }),
    prompt: ids,
    ...rest,
    ...(stop.length && { stop }),
    seed,
  };
}

/* What a stream has brought so far, in numbers. */
class Clock {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.numTokens = 0;
    this.promptTokens = null;
    this.cachedTokens = null;
  }

  note(numTokens) {
    const now = performance.now();
    if (!numTokens) return;
    this.first ??= now;
    this.last = now;
    this.numTokens += numTokens;
  }

  get figures() {
    const drawing = (this.last - this.first) / 1000;
    return {
      numTokens: this.numTokens,
      promptTokens: this.promptTokens,
      firstTokenSeconds: this.first === null ? null : (this.first - this.began) / 1000,
      tokensPerSecond: this.numTokens > 1 && drawing > 0 ? (this.numTokens - 1) / drawing : null,
      cachedTokens: this.cachedTokens,
    };
  }
}

/* Streams the choices of a request into answers. `on.progress(clock)` after each event. */
export async function drawAnswers(path, body, answers, signal, on) {
  const clock = new Clock();
  for await (const chunk of stream(path, body, signal)) {
    if (chunk.usage) {
      clock.promptTokens = chunk.usage.prompt_tokens;
      clock.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? null;
    }
    for (const choice of chunk.choices ?? []) {
      const answer = answers[choice.index];
      const before = answer.numTokens;
      answer.feed(choice);
      clock.note(answer.numTokens - before);
    }
    on.progress(clock.figures);
  }
  return clock.figures;
}

export class Writer {
  /* `changed()` whenever there is something new to show. */
  constructor(facts, changed) {
    this.facts = facts;
    this.changed = changed;
    this.job = null;
  }

  get running() {
    return this.job !== null;
  }

  stop() {
    this.job?.controller.abort();
  }

  /* Continues `base` as a new branch of the document. Raises: ApiError; the text then stays. */
  async draw(doc, base, settings, { seed, run = newRun(), selection } = {}) {
    const n = settings.n;
    const picked = base[base.length - 1]?.run === run ? 1 : 0;
    const before = doc.pieces;
    doc.settle();
    doc.replace(withoutEnd(base), selection);
    const controller = new AbortController();
    const runs = Array.from({ length: n }, (_, index) => (index ? `${run}.${index}` : run));
    const answers = runs.map((name, index) => new Answer(name, index ? 0 : picked));
    this.job = { controller, doc, answers, base: doc.pieces, shown: 0, settings, figures: {} };
    this.changed();
    try {
      const prompt = await promptOf(doc.pieces, this.facts, controller.signal);
      const body = completionBody(this.facts, settings, prompt.ids, seed);
      const details = {
        logprobs: TOP_LOGPROBS,
        return_token_ids: true,
        stream: true,
        stream_options: { include_usage: true },
      };
      const progress = (figures) => {
        this.job.figures = { ...figures, promptTokens: prompt.ids.length };
        this.#show();
      };
      await drawAnswers("/v1/completions", { ...body, ...details }, answers, controller.signal, {
        progress,
      });
    } catch (error) {
      if (!controller.signal.aborted) {
        if (!answers.some((answer) => answer.text) && !picked) this.#takeBack(doc, before);
        throw error;
      }
    } finally {
      this.#finish(seed, runs);
    }
  }

  /* Shows another one of several answers while they are drawn. */
  turn(step) {
    const { job } = this;
    job.shown = (job.shown + step + job.answers.length) % job.answers.length;
    this.#show();
  }

  #show() {
    const { doc, base, answers, shown } = this.job;
    doc.extend([...base, ...answers[shown].pieces()]);
    this.changed();
  }

  #takeBack(doc, before) {
    doc.undo();
    doc.future = [];
    doc.extend(before);
    this.job.taken = true;
  }

  #finish(seed, runs) {
    const { doc, base, answers, shown, settings, figures, taken } = this.job;
    this.job = null;
    if (!taken) {
      const versions = answers.map((answer) => [...base, ...answer.pieces()]);
      doc.extend(versions[shown]);
      answers.forEach((answer, index) => {
        doc.runs[runs[index]] = {
          seed,
          settings,
          figures,
          finishReason: answer.finishReason,
          choice: index,
        };
      });
      doc.keep(versions.filter((_, index) => answers[index].numTokens));
    }
    this.changed();
  }

  /* The document's text with a score for every token. */
  async score(doc, signal) {
    const pieces = doc.pieces;
    const { ids, numBegin, parts } = await promptOf(pieces, this.facts, signal);
    const answer = await ask(
      "/v1/completions",
      {
        model: this.facts.name,
        prompt: ids,
        max_tokens: 0,
        echo: true,
        logprobs: TOP_LOGPROBS,
        return_token_ids: true,
      },
      signal,
    );
    const tokens = completionTokens(answer.choices[0], true).slice(numBegin);
    const last = pieces[pieces.length - 1];
    if (doc.pieces !== pieces) return false; // edited meanwhile
    doc.annotate(withScores(parts, tokens, last?.end ? last : null, this.facts));
    return true;
  }
}

function withoutEnd(pieces) {
  return pieces[pieces.length - 1]?.end ? pieces.slice(0, -1) : pieces;
}

/* An alternative as it is put into the text: its id, and the text it shows there. */
export async function alternativeAt(doc, index, other, tokeniseText) {
  const before = doc.pieces.slice(0, index);
  let { id } = other;
  if (id === undefined) {
    const ids = await tokeniseText(other.name, false);
    if (ids.length !== 1)
      throw new ApiError(`“${other.name}” is not a single token, so it cannot be put here.`);
    [id] = ids;
  }
  return { ...other, id, text: textAfter(before, other.name) };
}
