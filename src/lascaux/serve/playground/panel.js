/* The sampling panel: fields with their explanations, presets, values that are remembered. */

const STORED = "lascaux.sampling";

const FIELDS = [
  {
    key: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    start: 0.8,
    slide: true,
    help: "0 takes the likeliest token; higher is more varied.",
  },
  {
    key: "top_p",
    label: "Top-p",
    min: 0,
    max: 1,
    step: 0.01,
    start: 1,
    slide: true,
    help: "Draw from the fewest tokens that together reach this probability.",
  },
  {
    key: "max_tokens",
    label: "Max tokens",
    min: 1,
    max: 100000,
    step: 1,
    start: 64,
    help: "Most tokens to draw in one go.",
  },
  {
    key: "n",
    label: "Continuations",
    min: 1,
    max: 8,
    step: 1,
    start: 1,
    help: "Draw several at once; they become branches.",
  },
  {
    key: "top_k",
    label: "Top-k",
    min: 0,
    max: 1000000,
    step: 1,
    start: 0,
    more: true,
    help: "Draw from the k likeliest tokens only; 0: all.",
  },
  {
    key: "min_p",
    label: "Min-p",
    min: 0,
    max: 1,
    step: 0.01,
    start: 0,
    more: true,
    help: "Leave out tokens below this fraction of the likeliest one's probability.",
  },
  {
    key: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.01,
    max: 100,
    step: 0.01,
    start: 1,
    more: true,
    help: "Above 1: tokens of prompt and answer become less likely.",
  },
  {
    key: "frequency_penalty",
    label: "Frequency penalty",
    min: -2,
    max: 2,
    step: 0.05,
    start: 0,
    more: true,
    help: "Taken from a token's logit for each time it was drawn.",
  },
  {
    key: "presence_penalty",
    label: "Presence penalty",
    min: -2,
    max: 2,
    step: 0.05,
    start: 0,
    more: true,
    help: "Taken once from the logit of every token that was drawn.",
  },
];

const NEUTRAL = {
  top_p: 1,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  frequency_penalty: 0,
  presence_penalty: 0,
};
const PRESETS = {
  Greedy: { ...NEUTRAL, temperature: 0 },
  Balanced: { ...NEUTRAL, temperature: 0.8, top_p: 0.95 },
  Wild: { ...NEUTRAL, temperature: 1.2, min_p: 0.02 },
};

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

/* Stop strings are written one a line, with \n, \t and \\ for what a line cannot hold. */
function parseStops(text) {
  const unescaped = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (found) => unescaped[found]));
}

export class Panel {
  constructor(form, presets) {
    this.form = form;
    this.inputs = {};
    const values = {
      ...Object.fromEntries(FIELDS.map(({ key, start }) => [key, start])),
      ...stored(),
    };
    this.#build(values);
    for (const [name, preset] of Object.entries(PRESETS)) {
      const button = element("button", { type: "button", textContent: name });
      button.addEventListener("click", () => this.#set(preset));
      presets.append(button);
    }
    form.addEventListener("input", (event) => this.#input(event));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  #build(values) {
    const more = element("details", {}, element("summary", { textContent: "More" }));
    more.open = Boolean(values.more);
    more.addEventListener("toggle", () => this.#store());
    for (const field of FIELDS)
      (field.more ? more : this.form).append(this.#field(field, values[field.key]));
    this.more = more;
    more.append(
      this.#check(
        "ignore_eos",
        "Go on past the end",
        "Draw on when the model ends the text.",
        values.ignore_eos,
      ),
    );
    this.form.append(this.#seed(values.seed), this.#stops(values.stop ?? ""), more);
  }

  #field({ key, label, help, min, max, step, slide }, value) {
    const id = `sampling-${key}`;
    const input = element("input", {
      id,
      type: "number",
      name: key,
      min,
      max,
      step: "any",
      value,
      required: true,
    });
    input.inputMode = "decimal";
    input.setAttribute("aria-describedby", `${id}-help`);
    this.inputs[key] = input;
    const box = element(
      "div",
      { className: `field ${key}` },
      element("label", { htmlFor: id, textContent: label }),
      input,
    );
    if (slide) {
      const range = element("input", {
        type: "range",
        min,
        max,
        step,
        value,
        name: `${key}-slide`,
      });
      range.setAttribute("aria-label", `${label}, slider`);
      range.tabIndex = -1;
      box.append(range);
    }
    box.append(element("small", { id: `${id}-help`, textContent: help }));
    return box;
  }

  #check(key, label, help, value) {
    const id = `sampling-${key}`;
    const input = element("input", { id, type: "checkbox", name: key, checked: Boolean(value) });
    this.inputs[key] = input;
    return element(
      "div",
      { className: "field check" },
      element("label", { htmlFor: id, textContent: label }),
      input,
      element("small", { textContent: help }),
    );
  }

  #seed(value) {
    const input = element("input", {
      id: "sampling-seed",
      type: "number",
      name: "seed",
      step: 1,
      value: value ?? "",
      placeholder: "new",
    });
    input.inputMode = "numeric";
    this.inputs.seed = input;
    return element(
      "div",
      { className: "field" },
      element("label", { htmlFor: "sampling-seed", textContent: "Seed" }),
      input,
      element("small", {
        textContent: "The same seed gives the same text; empty: a new one each time.",
      }),
    );
  }

  #stops(value) {
    const input = element("textarea", {
      id: "sampling-stop",
      name: "stop",
      rows: 1,
      value,
      spellcheck: false,
    });
    this.inputs.stop = input;
    return element(
      "div",
      { className: "field" },
      element("label", { htmlFor: "sampling-stop", textContent: "Stop" }),
      input,
      element("small", { textContent: "End before any of these, one a line; \\n is a new line." }),
    );
  }

  #input(event) {
    const { name, value } = event.target;
    if (name.endsWith("-slide")) this.inputs[name.slice(0, -6)].value = value;
    else this.#follow(name);
    this.#store();
  }

  #follow(key) {
    const range = this.form.elements[`${key}-slide`];
    if (range) range.value = this.inputs[key].value;
  }

  #set(values) {
    for (const [key, value] of Object.entries(values)) {
      this.inputs[key].value = value;
      this.#follow(key);
    }
    this.#store();
  }

  #store() {
    const values = { more: this.more.open };
    for (const [key, input] of Object.entries(this.inputs)) {
      if (input.type === "checkbox") values[key] = input.checked;
      else if (input.value !== "" && input.validity.valid)
        values[key] = input.type === "number" ? Number(input.value) : input.value;
    }
    try {
      localStorage.setItem(STORED, JSON.stringify(values));
    } catch {
      // Full or forbidden: the values last as long as the page.
    }
  }

  /* The server's own settings, where nothing else was chosen before. */
  learn(defaults) {
    const chosen = stored();
    for (const { key } of FIELDS) {
      if (defaults[key] === undefined || chosen[key] !== undefined) continue;
      this.inputs[key].value = defaults[key];
      this.#follow(key);
    }
  }

  /* The seed that is asked for; null: a new one each time. */
  get seed() {
    return this.inputs.seed.value === "" ? null : Number(this.inputs.seed.value);
  }

  /* Fields of a request as the server names them, or null after pointing at what is not valid. */
  settings() {
    const wrong = Object.values(this.inputs).find((input) => !input.checkValidity());
    if (wrong) {
      if (this.more.contains(wrong)) this.more.open = true;
      wrong.reportValidity();
      return null;
    }
    const settings = {};
    for (const { key, step } of FIELDS) {
      const value = Number(this.inputs[key].value);
      settings[key] = step === 1 ? Math.round(value) : value;
    }
    settings.ignore_eos = this.inputs.ignore_eos.checked;
    settings.stop = parseStops(this.inputs.stop.value);
    return settings;
  }
}
