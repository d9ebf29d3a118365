async (seed) => {
  const { TextDocument } = await import("/playground/document.js");
  const { decodeDocument, encodeDocument } = await import("/playground/saved.js");
  const { textOf } = await import("/playground/pieces.js");
  let state = seed;
  const random = (n) => {
    state = (state * 1103515245 + 12345) % 2147483648;
    return Math.floor((state / 2147483648) * n);
  };
  let doc = new TextDocument(),
    plain = "",
    number = 0;
  const drawn = [],
    history = [""],
    problems = [];
  const check = (what) => {
    if (doc.text !== plain) problems.push(`${what}: ${doc.text} / ${plain}`);
  };
  for (let turn = 0; turn < 400; turn++) {
    const kind = random(10);
    if (kind < 5) {
      const start = random(plain.length + 1),
        end = Math.min(plain.length, start + random(4));
      const inserted = ["", "x", "ab", " é", "\n"][random(5)];
      doc.edit(start, end, inserted, { now: turn * 5000 });
      plain = plain.slice(0, start) + inserted + plain.slice(end);
    } else if (kind < 8) {
      const base = kind === 7 ? doc.beforeLastRun() : doc.pieces,
        run = `r${number++}`;
      doc.settle();
      doc.replace(base);
      const tokens = Array.from({ length: 1 + random(4) }, (_, at) => ({
        text: ["a", " b", "", "cc"][random(4)],
        id: at,
        run,
        at,
        logprob: -1,
      }));
      doc.extend([...base, ...tokens]);
      doc.keep([doc.pieces]);
      drawn.push([run, tokens.length]);
      plain = textOf(doc.pieces);
    } else if (kind === 8) {
      const forks = doc.forks();
      const fork = forks[random(forks.length)];
      if (fork) doc.goTo(fork.children[random(fork.count)]);
      plain = doc.text;
    } else if (random(2)) {
      if (doc.undo()) doc.redo();
    } else {
      doc = decodeDocument(JSON.parse(JSON.stringify(encodeDocument(doc))));
    }
    check(turn);
    doc.settle();
    check("settled");
    if (textOf(doc.tree.piecesTo(doc.end)) !== plain) problems.push("the tree shows another text");
  }
  const kept = {};
  for (const node of doc.tree.nodes.values()) {
    for (const piece of node.pieces)
      if (piece.run && !piece.stale) (kept[piece.run] ??= new Set()).add(piece.at);
    if (node.id && node.id !== doc.end && node.children.length === 1)
      problems.push("a node with one child");
  }
  for (const [run, count] of drawn) if (kept[run]?.size !== count) problems.push(`lost of ${run}`);
  return problems;
};
