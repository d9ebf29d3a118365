/* The completion page: a document, its editor and all that can be done to it. */

import { ApiError, tokenise } from "./api.js";
import { BranchView } from "./branches.js";
import { Editor } from "./editor.js";
import { paintText, placeMarks } from "./marks.js";
import { promptOf } from "./prompt.js";
import { keyNames, pressed, shortcuts } from "./keys.js";
import { $, announce, openShare, say } from "./shell.js";
import { finishWords, meanWords, statusWords } from "./status.js";
import { TokenView } from "./tokenview.js";
import { Writer, alternativeAt, completionBody, newRun, newSeed } from "./writer.js";

const SETTLE_MS = 350;
const COUNT_MS = 600;
const TRAILING_SPACE = "ends with a space, from which most models go on badly";

export class Complete {
  constructor({ facts, panel, store, doc, popover }) {
    Object.assign(this, { facts, panel, store, doc, popover });
    this.surprise = false;
    this.editor = new Editor($("editor"), {
      edit: (start, end, inserted, selection) => this.#edited(start, end, inserted, selection),
      text: () => this.doc.text,
      undo: () => this.undo(),
      redo: () => this.redo(),
      select: () => this.#caretMoved(),
    });
    this.writer = new Writer(facts, () => this.#drawn());
    this.view = new TokenView(this, popover);
    this.branches = new BranchView(this);
    this.keys = shortcuts(this);
    this.#wire();
    this.show(doc);
  }

  /* Ends what is being drawn, and keeps it. */
  async halt() {
    this.writer.stop();
    await this.drawing?.catch(() => {});
  }

  get isShown() {
    return !$("complete").hidden;
  }

  /* Another document takes the place of this one. */
  show(doc) {
    this.doc = doc;
    this.branches.forget();
    const end = doc.length;
    this.editor.show(doc.text, { start: end, end });
    this.#rest();
    this.focus();
  }

  focus() {
    if (matchMedia("(hover: hover)").matches) this.editor.focus();
  }

  #wire() {
    const click = (id, action) => $(id).addEventListener("click", action);
    click("continue", () => (this.writer.running ? this.writer.stop() : this.continue()));
    click("retry", () => this.retry());
    click("undo", () => this.undo());
    click("redo", () => this.redo());
    click("previous", () => this.turn(-1));
    click("next", () => this.turn(1));
    click("tokens", () => this.view.toggle());
    click("surprise", () => this.toggleSurprise());
    click("score", () => this.score());
    click("share", () => this.share());
    document.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("resize", () => this.#decorate());
    addEventListener("pagehide", () => this.store.save(this.doc));
    $("scroller").addEventListener("pointerdown", (event) => {
      if (event.target.closest(".sheet") && !event.target.closest("#editor, button, i")) {
        event.preventDefault();
        this.editor.focus({ start: this.doc.length, end: this.doc.length });
      }
    });
  }

  #key(event) {
    if (!this.isShown || document.querySelector("dialog[open]")) return;
    const inField = event.target.closest("input, textarea");
    const found = this.keys.find(
      ([keys]) => pressed(event, keys) && !(inField && /Mod.*Key/.test(keys)),
    );
    if (found) found[1]();
    else if (event.key === "Escape" && this.writer.running) this.writer.stop();
    else if (event.key === "Escape" && this.scoring) this.scoring.abort();
    else return;
    event.preventDefault();
  }

  // Editing

  #edited(start, end, inserted, selection) {
    this.doc.edit(start, end, inserted, { selection, now: performance.now() });
    this.branches.forget();
    this.editor.show(this.doc.text);
    this.popover.hide();
    this.#paint();
    this.#buttons();
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.#rest(), SETTLE_MS);
  }

  #caretMoved() {
    this.branches.forget();
    if (!this.writer.running) this.branches.showForks();
  }

  undo() {
    this.#travel(() => this.doc.undo(this.editor.selection));
  }

  redo() {
    this.#travel(() => this.doc.redo(this.editor.selection));
  }

  async #travel(move) {
    await this.halt();
    const selection = move();
    if (!selection) return;
    this.editor.show(this.doc.text, selection);
    this.#rest();
  }

  // Drawing

  continue() {
    return this.#draw(this.doc.pieces, this.#seed());
  }

  /* The same place again; a fixed seed moves on, or the same text would come. */
  retry() {
    if (this.writer.running) return;
    const base = this.doc.beforeLastRun();
    this.doc.settle();
    return this.#draw(
      base,
      this.panel.seed === null ? newSeed() : this.panel.seed + this.doc.numAfter(base),
    );
  }

  branchHere() {
    if (this.writer.running) return;
    const { end } = this.editor.selection;
    return this.#draw(this.doc.upTo(end), this.#seed());
  }

  /* Puts another token in the place of one, and goes on from there. */
  async pick(index, alternative) {
    if (this.writer.running) return;
    try {
      const other = await alternativeAt(this.doc, index, alternative, tokenise);
      const run = newRun();
      const base = this.doc.withAlternative(index, other, run);
      if (other.name !== this.facts.endToken) return await this.#draw(base, this.#seed(), run);
      this.doc.replace([...base.slice(0, -1), { ...base[base.length - 1], end: true }]);
      this.editor.show(this.doc.text);
      this.#rest();
    } catch (error) {
      this.#failed(error);
    }
  }

  #seed() {
    return this.panel.seed ?? newSeed();
  }

  async #draw(base, seed, run) {
    if (this.writer.running) return;
    const settings = this.panel.settings();
    if (!settings) return;
    say($("message"), null);
    this.popover.hide();
    this.scoring?.abort();
    clearTimeout(this.settling);
    this.follow = this.editor.endIsVisible();
    this.drawing = this.writer.draw(this.doc, base, settings, {
      seed,
      run,
      selection: this.editor.selection,
    });
    try {
      await this.drawing;
      announce("Done");
    } catch (error) {
      this.#failed(error);
    }
    const { figures } = this.doc.lastRun() ?? {};
    if (settings.n === 1 && figures?.promptTokens)
      this.numTokens = figures.promptTokens + figures.numTokens;
    const end = this.doc.length;
    this.editor.show(this.doc.text, { start: end, end });
    this.#rest();
  }

  #failed(error, again = () => this.continue()) {
    if (!(error instanceof ApiError)) console.error(error);
    const full = error.code === "context_length_exceeded";
    say(
      $("message"),
      full ? `The text is too long for the model. ${error.message}` : error.message,
      { label: "Try again", run: again },
    );
  }

  /* While tokens come: at most once a frame. */
  #drawn() {
    $("complete").setAttribute("aria-busy", String(this.writer.running));
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.editor.lock(this.writer.running);
      const { length } = this.editor.text;
      this.editor.show(this.doc.text);
      if (this.doc.length > length && this.follow) this.editor.scrollToEnd();
      this.#paint();
      this.#buttons();
      this.#status();
      if (this.writer.running) this.branches.showAnswers(this.writer.job);
    });
  }

  turn(step) {
    if (!this.writer.running) this.branches.turn(step);
    else if (this.writer.job.answers.length > 1) this.writer.turn(step);
  }

  /* Shows the version at or below a node of the tree. */
  goTo(node) {
    if (this.writer.running) return;
    this.doc.goTo(node);
    const end = this.doc.length;
    this.editor.show(this.doc.text, { start: end, end });
    this.#rest();
  }

  // Tokens

  toggleSurprise(on = !this.surprise) {
    this.surprise = on;
    $("surprise").setAttribute("aria-pressed", String(on));
    $("legend").hidden = !on;
    this.#decorate();
  }

  async score() {
    if (this.writer.running || !this.doc.length) return;
    say($("message"), null);
    this.scoring?.abort();
    const scoring = new AbortController();
    this.scoring = scoring;
    this.toggleSurprise(true);
    this.#status();
    try {
      await this.writer.score(this.doc, scoring.signal);
    } catch (error) {
      if (!scoring.signal.aborted) this.#failed(error, () => this.score());
    }
    if (this.scoring === scoring) this.scoring = null;
    this.#rest();
  }

  /* The request that drew the end of the text, else the one that would be sent now. */
  async share() {
    const settings = this.panel.settings();
    if (!settings) return;
    try {
      const last = this.doc.lastRun();
      const base = last ? this.doc.beforeLastRun() : this.doc.pieces;
      const { ids } = await promptOf(base, this.facts);
      const typed = base.every((piece) => piece.run === undefined) && base.length > 0;
      const text = base.map((piece) => piece.text).join("");
      // Read as text, the names of special tokens would be ordinary text.
      const asText = typed && !/<[^<>]*>/.test(text);
      const body = completionBody(
        this.facts,
        last?.settings ?? settings,
        asText ? text : ids,
        last?.seed ?? this.#seed(),
      );
      const notes = [];
      if (!asText)
        notes.push("The prompt is token ids, so that drawn text is read exactly as it was drawn.");
      if (last?.settings.n > 1)
        notes.push(`The text shown is number ${last.choice + 1} of ${last.settings.n}.`);
      const note = notes.join(" ");
      openShare({ path: "/v1/completions", body, note });
    } catch (error) {
      this.#failed(error);
    }
  }

  // Showing

  /* All that is worth doing when the text has come to rest. */
  #rest() {
    clearTimeout(this.settling);
    this.editor.lock(this.writer.running);
    if (this.writer.running) return;
    this.doc.settle();
    this.editor.show(this.doc.text);
    this.#decorate();
    this.branches.drawOutline();
    this.#buttons();
    this.#status();
    this.#count();
    this.store.save(this.doc);
  }

  #paint() {
    paintText(
      this.editor,
      this.doc.pieces,
      this.surprise ? "surprise" : this.view.on ? "tokens" : "origin",
    );
  }

  #decorate() {
    if (!this.isShown) return;
    const { pieces } = this.doc;
    this.#paint();
    placeMarks($("marks"), this.editor, document.querySelector(".sheet"), pieces);
    if (this.writer.running) this.branches.showAnswers(this.writer.job);
    else this.branches.showForks(this.doc.forks());
    $("mean").textContent = meanWords(pieces);
  }

  refresh() {
    this.#decorate();
    this.focus();
  }

  /* The server has told what model there is. */
  learned() {
    this.#status();
    this.#count();
  }

  #buttons() {
    const running = this.writer.running;
    $("continue").firstElementChild.textContent = running ? "Stop" : "Continue";
    $("continue").lastElementChild.textContent = keyNames(running ? "Esc" : "Mod+Enter");
    $("retry").disabled = running || !this.doc.length;
    $("undo").disabled = !this.doc.past.length;
    $("redo").disabled = running || !this.doc.future.length;
  }

  #status() {
    $("score").disabled = Boolean(this.scoring);
    if (this.scoring) {
      $("status").textContent = "scoring the text…";
      return;
    }
    const { job } = this.writer;
    const last = this.doc.lastRun();
    const figures = job ? job.figures : { ...last?.figures, seed: last?.seed };
    if (!job && last) figures.finish = finishWords(last);
    if (!job && !last && this.doc.text.endsWith(" ")) figures.hint = TRAILING_SPACE;
    if (job?.answers.length === 1 && figures.promptTokens)
      this.numTokens = figures.promptTokens + figures.numTokens;
    $("status").textContent = statusWords(
      figures,
      Boolean(job),
      this.numTokens,
      this.facts.maxContext,
    );
  }

  /* How much of the context the text takes. */
  #count() {
    clearTimeout(this.counting);
    this.counting = setTimeout(async () => {
      const { pieces } = this.doc;
      try {
        const { ids } = await promptOf(pieces, this.facts);
        if (this.doc.pieces !== pieces) return;
        this.numTokens = pieces.length ? ids.length : 0;
        this.#status();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error; // a count is not worth a message
      }
    }, COUNT_MS);
  }
}
