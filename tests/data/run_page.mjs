// Runs the script of the web page against a server, with the few parts of a browser that it uses.
// node run_page.mjs PAGE URL STEPS: each step is {text, picture, think}; prints what the page shows as JSON.

import { readFileSync } from "node:fs";

const [page, url, steps] = process.argv.slice(2);
const script = readFileSync(page, "utf8").match(/<script>([\s\S]*)<\/script>/)[1];

class Element {
  constructor(tag) {
    Object.assign(this, { tag, nodes: [], style: {}, hidden: false, checked: false, value: "", className: "" });
    this.classList = { add: (name) => (this.className += " " + name), remove: () => {} };
  }
  append(...nodes) { for (const node of nodes) { this.nodes.push(node); if (node.tag) node.parent = this; } }
  remove() { this.parent.nodes.splice(this.parent.nodes.indexOf(this), 1); }
  replaceChildren() { this.nodes = []; }
  get children() { return this.nodes.filter((node) => node.tag); }
  get textContent() { return this.nodes.map((node) => (node.tag ? node.textContent : node)).join(""); }
  set textContent(text) { this.nodes = text === "" ? [] : [text]; }
  focus() {}
  click() {}
  requestSubmit() { this.onsubmit({ preventDefault() {} }); }
}

const byId = {};
globalThis.document = {
  title: "",
  body: new Element("body"),
  createElement: (tag) => new Element(tag),
  getElementById: (id) => (byId[id] ??= new Element(id)),
};
globalThis.sessionStorage = { getItem: () => null, setItem() {} };
globalThis.prompt = () => null;
globalThis.FileReader = class {
  readAsDataURL(file) { this.result = file.url; this.onload(); }
};
const sent = [];
const { fetch } = globalThis;
globalThis.fetch = (path, options) => {
  if (options.body) sent.push(JSON.parse(options.body));
  // no connection is kept: node, unlike a browser, does not ask again when the server has just closed an idle one
  return fetch(`${url}/${path}`, { ...options, headers: { ...options.headers, connection: "close" } });
};

const until = async (what) => {
  for (let i = 0; !what(); i++) {
    if (i > 1000) throw new Error("the page did not come to rest");
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
};
const $ = (id) => document.getElementById(id);
$("attach").hidden = $("thinking").hidden = true;   // as in the page's text
await import("data:text/javascript," + encodeURIComponent(script.replace('"use strict";', "")));
await until(() => document.title);
for (const { text, picture, think } of JSON.parse(steps)) {
  if (picture) {
    $("files").files = [{ type: "image/png", url: picture }];
    $("files").onchange();
    await until(() => $("pictures").children.length === 1);
  }
  $("think").checked = Boolean(think);
  $("text").value = text;
  $("form").onsubmit({ preventDefault() {} });
  await until(() => $("send").textContent === "Send");
}
const turns = $("turns").children.map((turn) => ({
  kind: turn.className,
  text: turn.children.at(-1)?.tag === "span" ? turn.children.at(-1).textContent : turn.textContent,
  thoughts: turn.children[0]?.tag === "details" ? turn.children[0].children[1].textContent : "",
  pictures: turn.children.filter((node) => node.tag === "img").length,
}));
console.log(JSON.stringify({
  title: document.title, attach: !$("attach").hidden, thinking: !$("thinking").hidden, turns, sent,
}));
