"use strict";

// The page of `budwood serve`: asks several adapters at once, and shows their answers as they come.
// Texts of users and models are only ever set as text, never as HTML.

const at = (id) => document.getElementById(id);
const KEPT = "budwood"; // in sessionStorage: the token and the settings, until the tab is closed
const FIELDS = ["system", "temperature", "max", "seed", "form", "blend", "token"];
const MANY = 12; // adapters beyond which they can be filtered

let models = []; // as /v1/models lists them; the base first
let running = null; // AbortController of the requests in flight
const histories = new Map(); // messages by who answers

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Settings

function keep() {
  const kept = { chosen: chosen() };
  for (const id of FIELDS) kept[id] = at(id).value;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    // the browser keeps nothing
  }
}

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function headers() {
  const token = at("token").value.trim();
  return token ? { authorization: `Bearer ${token}` } : {};
}

function notice(text) {
  at("notice").hidden = !text;
  at("notice").textContent = text;
}

// Errors, in plain words

async function explain(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // not from the server itself
  }
  if (response.status === 401) {
    at("settings").open = true;
    at("token").focus();
    return `${at("token").value ? "The server does not know this token" : "This server needs a token"}: enter yours under Settings.`;
  }
  if (response.status === 429) {
    const wait = response.headers.get("retry-after");
    return `${message || "The server is busy."} ${wait ? `Try again in ${wait} s.` : "Try again later."}`;
  }
  return message || `The server answered with status ${response.status}.`;
}

class Told extends Error {} // an error whose message is for the user

function told(error) {
  if (error instanceof Told) return error.message;
  return "The server cannot be reached. Is it still running?";
}

// Models

async function list() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Told(await explain(response));
    models = (await response.json()).data;
    notice("");
  } catch (error) {
    models = [];
    at("status").textContent = "";
    notice(told(error));
  }
  const wanted = recall().chosen ?? models.slice(0, 3).map((model) => model.id);
  at("choices").replaceChildren(...models.map((model) => choice(model, wanted.includes(model.id))));
  at("filter").hidden = models.length <= MANY;
  if (!models.length) return;
  const count = models.length - 1;
  at("status").textContent = `${models[0].id} · ${count} adapter${count === 1 ? "" : "s"}`;
}

function kind(model) {
  if (model.type === "base") return "base";
  return model.rank ? `${model.type.toLowerCase()} ${model.rank}` : (model.type ?? "").toLowerCase();
}

function choice(model, checked) {
  const box = element("input", { type: "checkbox", value: model.id, checked });
  box.addEventListener("change", keep);
  return element("label", { className: "choice" }, box, element("span", { textContent: model.id, title: model.id }),
    element("span", { className: "kind", textContent: kind(model) }));
}

function chosen() {
  return [...at("choices").querySelectorAll("input:checked")].map((box) => box.value);
}

/* Return {name: weight} of a text such as "a=0.7 b=0.3"; null: there is none. */
function weights(text) {
  const parts = text.trim().split(/[\s,]+/).filter(Boolean);
  if (!parts.length) return null;
  const found = {};
  for (const part of parts) {
    const [name, weight] = part.split("=");
    if (!name || !weight || !Number.isFinite(Number(weight)))
      throw new Told(`Blend: write NAME=WEIGHT, such as a=0.7 b=0.3, not “${part}”.`);
    found[name] = Number(weight);
  }
  return found;
}

/* Return who answers: key of the conversation, title, kind, what the request says, and whether it gets messages. */
function answerers() {
  const found = models.filter((model) => chosen().includes(model.id)).map((model) => ({
    key: model.id, title: model.id, kind: kind(model), fields: { model: model.id }, messages: getsMessages(model.id),
  }));
  const blend = weights(at("blend").value);
  if (blend) {
    const title = Object.entries(blend).map(([name, weight]) => `${name}=${weight}`).join(" ");
    const heaviest = Object.keys(blend).reduce((a, b) => (Math.abs(blend[b]) > Math.abs(blend[a]) ? b : a));
    const fields = { model: models[0]?.id, adapters: blend };
    found.push({ key: `=${title}`, title, kind: "blend", fields, messages: getsMessages(heaviest) });
  }
  return found;
}

function find(id) {
  return models.find((model) => model.id === id);
}

/* Return whether a model is sent messages: as it was trained, and the base as the adapters beside it were. */
function getsMessages(id) {
  const form = at("form").value;
  if (form) return form === "messages";
  const base = models[0];
  const trained = (name) => (find(name)?.on_messages ?? base.on_messages) !== false;
  const others = chosen().filter((name) => name !== base.id);
  return trained(id) && (id !== base.id || !others.length || others.some(trained));
}

function number(id, name, whole = true) {
  const text = at(id).value.trim();
  if (!text && !at(id).validity.badInput) return null;
  const value = Number(text);
  if (!at(id).validity.valid || (whole && !Number.isInteger(value))) {
    at("settings").open = true;
    at(id).focus();
    throw new Told(`${name}: ${at(id).validationMessage || "give a whole number."}`);
  }
  return value;
}

function sampling() {
  const values = {
    temperature: number("temperature", "Temperature", false), max_tokens: number("max", "Max tokens"), seed: number("seed", "Seed"),
  };
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null));
}

// Asking

async function ask() {
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  let who, options;
  try {
    who = answerers();
    options = sampling();
    if (!who.length) throw new Told(models.length ? "Choose who answers." : "There is no model to ask.");
  } catch (error) {
    notice(told(error));
    return;
  }
  notice("");
  keep();
  at("welcome")?.remove();
  at("prompt").value = "";
  grow();
  const answers = element("div", { className: "answers" });
  const turn = element("section", { className: "turn" }, element("p", { className: "asked", textContent: text }), answers);
  turn.setAttribute("aria-label", "Question and answers");
  const cards = who.map((one) => card(one, answers));
  at("turns").append(turn);
  turn.scrollIntoView({ block: "start" });
  running = new AbortController();
  busy(true);
  await Promise.all(who.map((one, i) => answer(one, text, options, cards[i], running.signal)));
  running = null;
  busy(false);
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("fresh").hidden = yes;
  // On a phone, the keyboard would cover the answers.
  if (!yes && document.activeElement === document.body && matchMedia("(pointer: fine)").matches) at("prompt").focus();
}

function stop() {
  running?.abort();
  at("prompt").focus();
}

function fresh() {
  histories.clear();
  for (const turn of at("turns").querySelectorAll(".turn")) turn.remove();
  at("fresh").hidden = true;
  notice("");
  at("prompt").focus();
}

function card(one, parent) {
  const text = element("pre", { tabIndex: 0 });
  const foot = element("footer");
  const box = element("article", { className: "answer" },
    element("header", {}, element("h2", { textContent: one.title, title: one.title }), element("span", { className: "kind", textContent: one.kind })),
    text, foot);
  box.setAttribute("aria-label", `Answer of ${one.title}`);
  text.setAttribute("role", "group"); // it can be focused, to scroll by keyboard
  text.setAttribute("aria-label", `Text of ${one.title}`);
  parent.append(box);
  return { box, text, foot };
}

function body(one, text, options) {
  const system = at("system").value.trim();
  const request = { ...one.fields, ...options, stream: true, stream_options: { include_usage: true } };
  if (!one.messages) return { ...request, prompt: text };
  const said = [...(histories.get(one.key) ?? []), { role: "user", content: text }];
  return { ...request, messages: system ? [{ role: "system", content: system }, ...said] : said };
}

async function answer(one, text, options, card, signal) {
  const request = body(one, text, options);
  const start = performance.now();
  let first = 0, pieces = 0, tokens = null, reason = null, stopped = false, problem = "", whole = "";
  card.box.setAttribute("aria-busy", "true");
  card.foot.textContent = "waiting…";
  const show = () => {
    card.foot.textContent = figures(tokens ?? pieces, first - start, performance.now() - first, reason, stopped);
  };
  try {
    for await (const event of events(one.messages ? "v1/chat/completions" : "v1/completions", request, signal)) {
      if (event.error) throw new Told(event.error.message ?? "The server reported an error.");
      tokens = event.usage?.completion_tokens ?? tokens;
      const part = event.choices?.[0];
      const piece = part?.delta?.content ?? part?.text ?? "";
      reason = part?.finish_reason ?? reason;
      if (!piece) continue;
      first ||= performance.now();
      pieces += 1;
      whole += piece;
      const below = card.text.scrollHeight - card.text.scrollTop - card.text.clientHeight < 40;
      card.text.append(piece);
      if (below) card.text.scrollTop = card.text.scrollHeight;
      show();
    }
  } catch (error) {
    stopped = signal.aborted;
    if (!stopped) problem = told(error);
  }
  card.box.setAttribute("aria-busy", "false");
  first ||= performance.now();
  show();
  if (problem) {
    card.foot.before(element("p", { className: "problem", textContent: problem }));
    card.foot.textContent = "";
    card.box.classList.add("failed");
  }
  at("status").textContent = `${one.title}: ${problem ? "failed" : stopped ? "stopped" : "finished"}`;
  if (one.messages && whole)
    histories.set(one.key, [...(histories.get(one.key) ?? []), { role: "user", content: text }, { role: "assistant", content: whole }]);
}

function figures(tokens, first, rest, reason, stopped) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 4 && rest > 0) parts.push(`${(((tokens - 1) * 1000) / rest).toFixed(1)} tokens/s`);
  if (tokens) parts.push(`first after ${(first / 1000).toFixed(2)} s`);
  if (stopped) parts.push("stopped");
  if (reason === "length") parts.push("limit reached");
  return parts.join(" · ");
}

/* Yield the JSON objects of a stream of server-sent events. */
async function* events(path, request, signal) {
  const response = await fetch(path, {
    method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(request), signal,
  });
  if (!response.ok) throw new Told(await explain(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Told("The connection broke off before the answer ended.");
    }
    if (read.done) throw new Told("The connection broke off before the answer ended.");
    const lines = (rest + read.value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (!line && data.length) {
        const text = data.join("\n");
        data = [];
        if (text === "[DONE]") return;
        yield JSON.parse(text);
      }
    }
  }
}

// Keys and buttons

function grow() {
  const box = at("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

at("ask").noValidate = true; // the fields' own messages are shown in the notice
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("prompt").addEventListener("input", grow);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
});
at("stop").addEventListener("click", stop);
at("fresh").addEventListener("click", fresh);
at("filter").addEventListener("input", () => {
  const wanted = at("filter").value.trim().toLowerCase();
  for (const label of at("choices").children) label.hidden = !label.textContent.toLowerCase().includes(wanted);
});
for (const id of FIELDS) at(id).addEventListener("change", keep);
at("token").addEventListener("change", list);

const kept = recall();
for (const id of FIELDS) if (kept[id]) at(id).value = kept[id];
list();
