"use strict";
// Text from models and from the server goes into the page as text, never as markup; figures come as the server rendered them.
const POLL_MILLISECONDS = 2000;
const find = (id) => document.getElementById(id);
const messages = [];
let counters = new Map();
let running = null;

function headers(more = {}) {
  const key = sessionStorage.getItem("key");
  return key ? { authorization: `Bearer ${key}`, ...more } : more;
}

// Tokens/s of each model between two looks at its counter.
function showRates() {
  const now = performance.now();
  const seen = new Map();
  for (const cell of document.querySelectorAll("[data-tokens]")) {
    const tokens = Number(cell.dataset.tokens);
    const before = counters.get(cell.dataset.model);
    if (before) cell.textContent = (((tokens - before.tokens) * 1000) / (now - before.when)).toFixed(1);
    seen.set(cell.dataset.model, { tokens, when: now });
  }
  counters = seen;
}

async function refresh() {
  const response = await fetch("/", { headers: headers() });
  if (response.status === 401) {
    sessionStorage.removeItem("key");
    find("refused").textContent = "wrong key";
    return;
  }
  if (!response.ok) throw new Error(`status ${response.status}`);
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  find("status").replaceWith(document.adoptNode(fresh.getElementById("status")));
  const locked = find("status").dataset.locked === "yes";
  find("unlock").hidden = !locked;
  find("chat").hidden = locked;
  const chosen = find("model").value;
  find("model").replaceChildren(...fresh.getElementById("model").children);
  if (chosen) find("model").value = chosen;
  showRates();
}

async function poll() {
  try {
    if (!document.hidden) await refresh();
    document.title = "helexa";
  } catch {
    document.title = "helexa (no answer)";
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

function add(kind, text = "") {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  find("conversation").append(element);
  return element;
}

// The data of server-sent events, one JSON document each, until [DONE].
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(asked, reply, element, signal) {
  const body = JSON.stringify({ model: find("model").value, messages: asked, stream: true });
  const options = { method: "POST", headers: headers({ "content-type": "application/json" }), body, signal };
  const response = await fetch("/v1/chat/completions", options);
  if (!response.ok) throw new Error((await response.json()).error.message);
  const thinking = document.createElement("span");
  thinking.className = "thinking";
  const content = document.createTextNode("");
  element.append(thinking, content);
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const delta = event.choices?.[0]?.delta ?? {};
    thinking.textContent += delta.reasoning_content ?? "";
    content.data += delta.content ?? "";
    reply.content = content.data;
  }
}

async function ask() {
  const question = find("question").value.trim();
  if (!question || running) return;
  find("question").value = "";
  add("user", question);
  running = new AbortController();
  find("send").hidden = true;
  find("stop").hidden = false;
  const asked = [...messages, { role: "user", content: question }];
  const reply = { role: "assistant", content: "" };
  try {
    await answer(asked, reply, add("assistant"), running.signal);
  } catch (error) {
    if (error.name !== "AbortError") add("error", error.message);
  }
  // An answer that never began is as if it had not been asked for; so is one that was cleared away.
  if (reply.content && find("conversation").hasChildNodes()) messages.splice(0, messages.length, ...asked, reply);
  running = null;
  find("send").hidden = false;
  find("stop").hidden = true;
}

// Loading and unloading; where the server asks for the admin's key, that is the one to unlock the page with.
find("status").parentNode.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  button.disabled = true;
  const body = JSON.stringify({ model: button.dataset.of, wait: false });
  const options = { method: "POST", headers: headers({ "content-type": "application/json" }), body };
  try {
    const response = await fetch(`/models/${button.dataset.act}`, options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    await refresh();
  } catch (error) {
    add("error", error.message);
  }
});

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  find("conversation").replaceChildren();
});
find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  find("refused").textContent = "";
  sessionStorage.setItem("key", find("key").value);
  find("key").value = "";
  refresh().catch((error) => {
    find("refused").textContent = error.message;
  });
});
poll();
