/* A conversation in which messages may be said again in other words: a tree. No DOM here.

   Each first message begins a conversation of its own, so that earlier ones stay. */

const VERSION = 1;

export class Conversation {
  constructor() {
    this.nodes = new Map([[0, { id: 0, parent: null, children: [], last: null }]]);
    this.next = 1;
    this.system = "";
  }

  get(id) {
    return this.nodes.get(id);
  }

  /* A message {role, content, …} after another one (0: none), which is then shown. */
  add(parent, message) {
    const node = { ...message, id: this.next++, parent, children: [], last: null };
    this.nodes.set(node.id, node);
    this.get(parent).children.push(node.id);
    this.get(parent).last = node.id;
    return node;
  }

  /* Takes away a message that nothing follows. */
  remove(id) {
    const parent = this.get(this.get(id).parent);
    parent.children = parent.children.filter((child) => child !== id);
    parent.last = parent.children[parent.children.length - 1] ?? null;
    this.nodes.delete(id);
  }

  /* The messages on show, first to last. */
  get shown() {
    const path = [];
    for (let id = this.get(0).last; id !== null; id = this.get(id).last) path.push(this.get(id));
    return path;
  }

  /* What the model reads before it writes a message in the place after `id`. */
  messagesTo(id) {
    const messages = [];
    for (let at = id; at !== 0; at = this.get(at).parent) {
      const { role, content } = this.get(at);
      messages.unshift({ role, content });
    }
    if (this.system.trim()) messages.unshift({ role: "system", content: this.system });
    return messages;
  }

  siblings(id) {
    const ids = this.get(this.get(id).parent).children;
    return { ids, index: ids.indexOf(id), count: ids.length };
  }

  choose(id) {
    this.get(this.get(id).parent).last = id;
  }

  turn(id, step) {
    const { ids, index, count } = this.siblings(id);
    this.choose(ids[(index + step + count) % count]);
  }

  startNew() {
    this.get(0).last = null;
  }

  get earlier() {
    return this.get(0)
      .children.map((id) => this.get(id))
      .reverse();
  }

  toJSON() {
    return { version: VERSION, system: this.system, nodes: [...this.nodes.values()] };
  }

  static from(saved) {
    if (saved.version !== VERSION)
      throw new Error(`version ${saved.version} of chats cannot be read`);
    const conversation = new Conversation();
    conversation.system = saved.system;
    conversation.nodes = new Map(saved.nodes.map((node) => [node.id, node]));
    conversation.next = Math.max(...conversation.nodes.keys()) + 1;
    if (!conversation.nodes.has(0)) throw new Error("the chats have no beginning");
    return conversation;
  }
}
