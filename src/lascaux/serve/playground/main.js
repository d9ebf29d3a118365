/* Puts the page together. */

import { ApiError, modelFacts } from "./api.js";
import { Chat } from "./chat.js";
import { Complete } from "./complete.js";
import { canPaint } from "./marks.js";
import { Panel } from "./panel.js";
import {
  $,
  say,
  setUpHelp,
  setUpKeyDialog,
  setUpPanel,
  setUpShare,
  setUpTabs,
  setUpTheme,
} from "./shell.js";
import { Store } from "./store.js";
import { setUpTexts } from "./texts.js";
import { TokenPopover } from "./tokens.js";

const LOADING = 503;
const ASK_AGAIN_MS = 1000;

function showModel(facts) {
  const details = [
    facts.precision,
    facts.maxContext && `${facts.maxContext.toLocaleString("en-US")} tokens`,
  ];
  for (const id of ["model", "panel-model"]) {
    const name = document.createElement("b");
    name.textContent = facts.name;
    $(id).replaceChildren(name, ["", ...details.filter(Boolean)].join(" · "));
  }
  document.title = `${facts.name} · Lascaux playground`;
}

/* Fills in what is known of the model once the server tells; says so while it cannot. */
async function learn(facts, ready) {
  try {
    Object.assign(facts, await modelFacts());
    say($("message"), null);
    showModel(facts);
    ready();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === LOADING) {
      $("model").textContent = "the model is loading…";
      setTimeout(() => learn(facts, ready), ASK_AGAIN_MS);
      return;
    }
    say($("message"), error.message, { label: "Try again", run: () => learn(facts, ready) });
  }
}

const facts = {
  name: "",
  maxContext: null,
  precision: null,
  hasTemplate: null,
  endToken: null,
  prefixed: false,
};
const warn = (message) => say($("message"), message);
const panel = new Panel($("sampling"), $("presets"));
const store = new Store(warn);
const popover = new TokenPopover($("popover"));
const page = new Complete({ facts, panel, store, doc: store.open(), popover });
const chat = new Chat({ facts, panel, popover });

setUpKeyDialog();
setUpTheme();
setUpHelp();
setUpPanel();
setUpShare();
setUpTexts(page, store);
setUpTabs((name) => {
  popover.hide();
  (name === "chat" ? chat : page).refresh();
});
if (!canPaint) warn("This browser cannot tint text, so drawn text looks like typed text here.");
learn(facts, () => {
  panel.learn(facts.defaults);
  page.learned();
  chat.learned();
});
