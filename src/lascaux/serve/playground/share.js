/* A request as a command or a program that repeats it. No DOM here. */

const OPENAI_FIELDS = new Set([
  "model",
  "prompt",
  "messages",
  "max_tokens",
  "temperature",
  "top_p",
  "n",
  "stop",
  "seed",
  "presence_penalty",
  "frequency_penalty",
]);
const NEUTRAL = {
  top_p: 1,
  top_k: 0,
  min_p: 0,
  n: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
  repetition_penalty: 1,
  ignore_eos: false,
};

/* Without fields that say what the server takes for granted. */
function brief(body) {
  return Object.fromEntries(Object.entries(body).filter(([key, value]) => NEUTRAL[key] !== value));
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(origin, path, body, withKey) {
  const lines = [`curl ${origin}${path}`, `  -H 'Content-Type: application/json'`];
  if (withKey) lines.push(`  -H "Authorization: Bearer $OPENAI_API_KEY"`);
  const fields = Object.entries(brief(body)).map(
    ([key, value]) => `    ${JSON.stringify(key)}: ${JSON.stringify(value)}`,
  );
  lines.push(`  -d ${shellQuoted(`{\n${fields.join(",\n")}\n  }`)}`);
  return lines.join(" \\\n");
}

/* A value as Python writes it. JSON's texts are Python's, but for halves of characters. */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([key, entry]) => `${JSON.stringify(key)}: ${python(entry)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function asPython(origin, path, body, withKey) {
  const chat = path.includes("chat");
  const fields = Object.entries(brief(body));
  const plain = fields
    .filter(([key]) => OPENAI_FIELDS.has(key))
    .map(([key, value]) => `    ${key}=${python(value)},`);
  const extra = Object.fromEntries(fields.filter(([key]) => !OPENAI_FIELDS.has(key)));
  if (Object.keys(extra).length) plain.push(`    extra_body=${python(extra)},`);
  const key = withKey ? "" : `, api_key="none"`;
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}${key})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...plain,
    ")",
    "for choice in answer.choices:",
    `    print(choice.${chat ? "message.content" : "text"})`,
  ].join("\n");
}
