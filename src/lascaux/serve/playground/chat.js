/* The chat page: a conversation, drawn by the server's chat API. */

import { Answer, textAfter } from "./answer.js";
import { ApiError, tokenise } from "./api.js";
import { Conversation } from "./conversation.js";
import { textOf } from "./pieces.js";
import { pressed } from "./keys.js";
import { $, announce, openShare, say } from "./shell.js";
import { finishWords, statusWords } from "./status.js";
import { TalkView } from "./talk.js";
import { TOP_LOGPROBS, completionBody, drawAnswers, newRun, newSeed } from "./writer.js";

const STORED = "lascaux.chat";
const MOST_CHARS = 1_500_000;
const PLAIN_STOP = "\nUser:"; // ends turns where a model has no template of its own

export class Chat {
  constructor({ facts, panel, popover }) {
    Object.assign(this, { facts, panel, popover });
    this.job = null;
    this.figures = {};
    this.conversation = this.#restore();
    this.view = new TalkView($("messages"), this, popover);
    $("system").value = this.conversation.system;
    $("system-box").open = Boolean(this.conversation.system);
    this.#wire();
    this.view.draw();
  }

  #wire() {
    $("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.job) this.job.controller.abort();
      else this.send();
    });
    $("say").addEventListener("input", fitHeight);
    $("say").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.altKey) return;
      event.preventDefault();
      if (!this.job) this.send();
    });
    $("system").addEventListener("input", () => {
      this.conversation.system = $("system").value;
      this.#save();
    });
    $("chat-new").addEventListener("click", () => this.startNew());
    $("chat-share").addEventListener("click", () => this.share());
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if ($("chat").hidden || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && this.job) this.job.controller.abort();
    else if (pressed(event, "Mod+Shift+Enter")) this.retry();
    else if (pressed(event, "Alt+ArrowLeft") || pressed(event, "Alt+BracketLeft"))
      this.turnLast(-1);
    else if (pressed(event, "Alt+ArrowRight") || pressed(event, "Alt+BracketRight"))
      this.turnLast(1);
    else if (pressed(event, "Alt+KeyC")) this.share();
    else return;
    event.preventDefault();
  }

  refresh() {
    if (matchMedia("(hover: hover)").matches) $("say").focus();
    this.#buttons();
  }

  learned() {
    $("chat-note").hidden = this.facts.hasTemplate !== false;
    $("chat-note").textContent =
      "This model has no chat template, so it may not know how to chat. " +
      "Turns are written as plain text, “User: …” and “Assistant: …”.";
  }

  // What can be done

  send() {
    const content = $("say").value;
    if (!content.trim()) return;
    const path = this.conversation.shown;
    const parent = path[path.length - 1]?.id ?? 0;
    const said = this.conversation.add(parent, { role: "user", content });
    $("say").value = "";
    fitHeight();
    return this.#answer(said.id, this.#seed());
  }

  /* Another answer in the place of the last one. */
  retry(id = this.#lastAnswer()) {
    if (this.job || !id) return;
    const { parent } = this.conversation.get(id);
    const again =
      this.panel.seed === null
        ? newSeed()
        : this.panel.seed + this.conversation.get(parent).children.length;
    return this.#answer(parent, again);
  }

  /* A message in other words, beside the old one; the model answers what a user says. */
  edit(id, content) {
    const { parent, role } = this.conversation.get(id);
    const said = this.conversation.add(parent, { role, content });
    if (role === "user") return this.#answer(said.id, this.#seed());
    this.#rest();
  }

  turn(id, step) {
    if (this.job) return;
    this.conversation.turn(id, step);
    this.#rest();
  }

  turnLast(step) {
    const several = this.conversation.shown.filter(
      ({ id }) => this.conversation.siblings(id).count > 1,
    );
    if (several.length) this.turn(several[several.length - 1].id, step);
  }

  show(id) {
    this.conversation.choose(id);
    this.#rest();
  }

  startNew() {
    if (this.job) return;
    this.conversation.startNew();
    this.#rest();
    $("say").focus();
  }

  /* Another token in the place of one of an answer; the answer goes on from there. */
  async pick(id, index, other) {
    if (this.job) return;
    const { parent, pieces, promptIds } = this.conversation.get(id);
    try {
      const ids = other.id === undefined ? await tokenise(other.name, false) : [other.id];
      if (ids.length !== 1)
        throw new ApiError(`“${other.name}” is not a single token, so it cannot be put here.`);
      const kept = pieces.slice(0, index);
      const run = newRun();
      const token = {
        ...other,
        id: ids[0],
        text: textAfter(kept, other.name),
        top: pieces[index].top,
        run,
        at: 0,
        picked: true,
      };
      const base = [...kept, token];
      await this.#answer(parent, this.#seed(), { base, run, promptIds });
    } catch (error) {
      this.#failed(error);
    }
  }

  async share() {
    const settings = this.panel.settings();
    const id = this.#lastAnswer();
    if (!settings) return;
    const { run, parent } = id ? this.conversation.get(id) : {};
    const shown = this.conversation.shown;
    const messages = this.conversation.messagesTo(id ? parent : (shown[shown.length - 1]?.id ?? 0));
    if (!messages.length) messages.push({ role: "user", content: $("say").value });
    openShare({
      path: "/v1/chat/completions",
      body: this.#body(messages, run?.settings ?? settings, run?.seed ?? this.#seed()),
    });
  }

  #lastAnswer() {
    const answers = this.conversation.shown.filter(({ role }) => role === "assistant");
    return answers[answers.length - 1]?.id;
  }

  #seed() {
    return this.panel.seed ?? newSeed();
  }

  #body(messages, settings, seed) {
    const { prompt, ...body } = completionBody(this.facts, { ...settings, n: 1 }, null, seed);
    return { ...body, messages };
  }

  // Drawing

  #request(parent, settings, seed, going) {
    const common = {
      return_token_ids: true,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (!going) {
      const body = this.#body(this.conversation.messagesTo(parent), settings, seed);
      return {
        path: "/v1/chat/completions",
        body: { ...body, ...common, logprobs: true, top_logprobs: TOP_LOGPROBS },
      };
    }
    const stop = this.facts.hasTemplate ? settings.stop : [...settings.stop, PLAIN_STOP];
    const ids = [...going.promptIds, ...going.base.map((piece) => piece.id)];
    const body = completionBody(this.facts, { ...settings, n: 1, stop }, ids, seed);
    return { path: "/v1/completions", body: { ...body, ...common, logprobs: TOP_LOGPROBS } };
  }

  /* A new answer after `parent`. `going`: it begins with the pieces of `base`. */
  async #answer(parent, seed, going = null) {
    const settings = this.panel.settings();
    if (this.job || !settings) return this.#rest();
    say($("chat-message"), null);
    this.popover.hide();
    const controller = new AbortController();
    const answer = new Answer(going?.run ?? newRun(), going ? 1 : 0);
    const base = going?.base ?? [];
    const node = this.conversation.add(parent, {
      role: "assistant",
      content: textOf(base),
      pieces: base,
    });
    this.job = { controller, node };
    this.figures = {};
    this.view.draw();
    this.#buttons();
    const progress = (figures) => {
      this.figures = { ...figures, seed };
      this.#take(node, base, answer);
      this.view.grow(node);
      this.#status();
    };
    try {
      const { path, body } = this.#request(parent, settings, seed, going);
      this.#status();
      await drawAnswers(path, body, [answer], controller.signal, { progress });
      announce("Done");
    } catch (error) {
      if (!controller.signal.aborted) this.#failed(error, () => this.#answer(parent, seed, going));
    }
    this.#take(node, base, answer);
    node.promptIds = going?.promptIds ?? answer.promptIds;
    node.run = { seed, settings, finishReason: answer.finishReason };
    // An answer that was stopped before its first word is not worth a branch.
    if (!node.content && !answer.finishReason) this.conversation.remove(node.id);
    this.job = null;
    this.#rest();
  }

  #take(node, base, answer) {
    node.pieces = [...base, ...answer.pieces()];
    node.content = textOf(node.pieces);
  }

  #failed(error, again) {
    if (!(error instanceof ApiError)) console.error(error);
    say($("chat-message"), error.message, again && { label: "Try again", run: again });
  }

  // Showing

  #rest() {
    this.view.draw();
    this.#buttons();
    this.#status();
    this.#save();
  }

  #buttons() {
    $("send").firstElementChild.textContent = this.job ? "Stop" : "Send";
    $("send").lastElementChild.hidden = Boolean(this.job);
    $("chat-new").disabled = Boolean(this.job) || !this.conversation.shown.length;
    $("chat").setAttribute("aria-busy", String(Boolean(this.job)));
  }

  #status() {
    const id = this.#lastAnswer();
    const run = id && this.conversation.get(id).run;
    const figures = { ...this.figures };
    if (!this.job && run) Object.assign(figures, { seed: run.seed, finish: finishWords(run) });
    const used = figures.promptTokens ? figures.promptTokens + (figures.numTokens ?? 0) : undefined;
    $("chat-status").textContent = statusWords(
      figures,
      Boolean(this.job),
      used,
      this.facts.maxContext,
    );
  }

  #restore() {
    try {
      const saved = localStorage.getItem(STORED);
      return saved ? Conversation.from(JSON.parse(saved)) : new Conversation();
    } catch (error) {
      say($("chat-message"), `Earlier chats cannot be read: ${error.message}`);
      return new Conversation();
    }
  }

  #save() {
    try {
      const all = JSON.stringify(this.conversation);
      const withoutTop = (key, value) => (key === "top" || key === "promptIds" ? undefined : value);
      localStorage.setItem(
        STORED,
        all.length < MOST_CHARS ? all : JSON.stringify(this.conversation, withoutTop),
      );
    } catch (error) {
      say(
        $("chat-message"),
        `The browser cannot keep this chat (${error.name}); it lasts until the page is closed.`,
      );
    }
  }
}

function fitHeight() {
  const box = $("say");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`;
}
