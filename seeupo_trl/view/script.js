"use strict";
// Texts of models and environments are set by textContent only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const trajectories = data.trajectories;
const fields = ["search", "task", "split", "iteration", "category", "stop", "success", "low", "high", "sort"];
const input = Object.fromEntries(fields.map((name) => [name, document.getElementById(name)]));
const list = document.getElementById("list");
const detail = document.getElementById("detail");
const explorer = document.getElementById("explorer");
const form = document.getElementById("filters");
let shown = [];
let current = null;
let lowered = null;  // the texts in lower case, once somebody searches

const SORTS = {
  "": ["Newest first", null],
  reward_down: ["Highest reward", (a, b) => number(b.reward) - number(a.reward)],
  reward_up: ["Lowest reward", (a, b) => number(a.reward) - number(b.reward)],
  turns_down: ["Most turns", (a, b) => b.turns.length - a.turns.length],
  tokens_down: ["Most tokens", (a, b) => tokens(b) - tokens(a)],
  ratio_down: ["Ratio farthest from 1", (a, b) => deviation(b) - deviation(a)],
  task: ["Task", (a, b) => a.task.localeCompare(b.task, undefined, { numeric: true })],
};

function number(value) {
  return value === null ? -Infinity : Number(value);
}

function tokens(trajectory) {
  return trajectory.turns.reduce((sum, turn) => sum + turn.action_tokens, 0);
}

function deviation(trajectory) {
  const ratios = trajectory.turns.map((turn) => turn.ratio).filter((ratio) => ratio !== null);
  return Math.max(-1, ...ratios.map((ratio) => Math.abs(Math.log(Number(ratio)))));
}

// A long text is stored once; a number stands for it.
function text(value) {
  return typeof value === "number" ? data.texts[value] : value;
}

// Control characters get their Unicode pictures; a lone surrogate is replaced when it is drawn.
function visible(value) {
  return value.replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421");
}

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  if (options.class) element.className = options.class;
  if (options.title) element.title = options.title;
  element.append(...children);
  return element;
}

function format(value, digits = 3) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : value.toFixed(digits);
}

function count(amount, noun) {
  return `${amount.toLocaleString("en")} ${noun}${amount === 1 ? "" : "s"}`;
}

// ---- Filters ----

function fill(select, label, values) {
  select.append(new Option(`${label}: any`, ""));
  for (const value of values) select.append(new Option(visible(String(value)), String(value)));
  if (values.length < 2) select.hidden = true;
}

function distinct(name) {
  const values = [...new Set(trajectories.map((t) => t[name]).filter((value) => value !== null))];
  return values.sort((a, b) => (typeof a === "number" ? b - a : a.localeCompare(b)));
}

function matches(trajectory, wanted) {
  const is = (name, value) => wanted[name] === "" || wanted[name] === String(value);
  if (!is("split", trajectory.split) || !is("iteration", trajectory.iteration)) return false;
  if (!is("category", trajectory.category) || !is("stop", trajectory.stop_reason)) return false;
  if (wanted.success !== "" && String(trajectory.success === true) !== wanted.success) return false;
  if (wanted.task !== "" && !trajectory.task.toLowerCase().includes(wanted.task.toLowerCase())) return false;
  if (wanted.low !== "" && !(trajectory.reward !== null && Number(trajectory.reward) >= Number(wanted.low))) return false;
  if (wanted.high !== "" && !(trajectory.reward !== null && Number(trajectory.reward) <= Number(wanted.high))) return false;
  return wanted.search === "" || contains(trajectory, wanted.search.toLowerCase(), wanted.hits);
}

function contains(trajectory, needle, hits) {
  const has = (value) => {
    if (typeof value === "number") return hits.has(value);
    return value !== null && value !== undefined && value.toLowerCase().includes(needle);
  };
  if (has(trajectory.task) || has(trajectory.info)) return true;
  return trajectory.turns.some((turn) =>
    [turn.action, turn.reasoning, turn.content, turn.context].some(has) ||
    turn.calls.some((call) => has(call.name) || has(call.arguments)) ||
    (turn.observations || []).some((message) => has(message.content)));
}

function wanted() {
  const values = Object.fromEntries(fields.map((name) => [name, input[name].value]));
  if (values.search !== "") {
    const needle = values.search.toLowerCase();
    lowered ??= data.texts.map((value) => value.toLowerCase());
    values.hits = new Set(lowered.flatMap((value, at) => (value.includes(needle) ? [at] : [])));
  }
  return values;
}

function update() {
  const values = wanted();
  shown = trajectories.filter((trajectory) => matches(trajectory, values));
  const compare = SORTS[values.sort][1];
  if (compare !== null) shown.sort(compare);
  list.replaceChildren(...shown.map(entry));
  summarize();
  select(shown.includes(current) ? current : shown[0] || null);
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function summarize() {
  const parts = [shown.length === trajectories.length
    ? count(shown.length, "trajectory").replace("trajectorys", "trajectories")
    : `${shown.length} of ${trajectories.length} trajectories`];
  const rewards = shown.map((t) => t.reward).filter((reward) => typeof reward === "number");
  if (rewards.length) parts.push(`mean reward ${format(mean(rewards))}`);
  const known = shown.filter((t) => t.success !== null);
  if (known.length) parts.push(`${Math.round(100 * mean(known.map((t) => Number(t.success))))}% solved`);
  if (data.note) parts.push(data.note);
  document.getElementById("summary").textContent = parts.join(" \u00b7 ");
}

// ---- The list ----

function outcome(trajectory) {
  if (trajectory.success === null) return "";
  return trajectory.success ? "good" : "bad";
}

function entry(trajectory) {
  const reward = make("span", { class: `reward ${outcome(trajectory)}`, title: "reward" }, format(trajectory.reward));
  const item = make("li", {},
    make("div", { class: "first" }, make("span", { class: "name" }, visible(trajectory.task)), reward),
    make("div", { class: "second" },
      make("span", {}, `${visible(trajectory.split)} ${trajectory.iteration} \u00b7 group ${trajectory.group}`),
      make("span", { class: trajectory.stop_reason === "completed" ? "" : "warn" },
        `${count(trajectory.turns.length, "turn")}${trajectory.stop_reason ? ", " + words(trajectory.stop_reason) : ""}`)));
  item.addEventListener("click", () => select(trajectory));
  return item;
}

function words(reason) {
  return visible(reason).replaceAll("_", " ");
}

function select(trajectory) {
  const entries = list.children;
  for (const item of list.querySelectorAll("[aria-current]")) item.removeAttribute("aria-current");
  const changed = trajectory !== current;
  current = trajectory;
  if (trajectory === null) {
    const reason = trajectories.length ? "No trajectory matches these filters." : "No trajectory to show.";
    detail.replaceChildren(make("p", { class: "empty" }, reason));
    return;
  }
  const item = entries[shown.indexOf(trajectory)];
  item.setAttribute("aria-current", "true");
  reveal(item);
  show(trajectory);
  if (changed) detail.scrollTop = 0;
}

// Scrolls the list alone: the page stays where the reader is.
function reveal(item) {
  const box = item.getBoundingClientRect();
  const frame = list.getBoundingClientRect();
  if (box.top < frame.top) list.scrollTop += box.top - frame.top;
  else if (box.bottom > frame.bottom) list.scrollTop += box.bottom - frame.bottom;
}

function move(step) {
  if (!shown.length) return;
  const at = Math.min(Math.max(shown.indexOf(current) + step, 0), shown.length - 1);
  select(shown[at]);
  explorer.scrollIntoView({ block: "nearest" });
}

// ---- One trajectory ----

function show(trajectory) {
  const where = [visible(trajectory.split), `iteration ${trajectory.iteration}`, `group ${trajectory.group}`,
    `trajectory ${trajectory.trajectory}`];
  if (trajectory.category !== null) where.push(visible(trajectory.category));
  const facts = [
    ["Reward", format(trajectory.reward), outcome(trajectory)],
    ["Success", trajectory.success === null ? "-" : trajectory.success ? "yes" : "no", outcome(trajectory)],
    ["Stop reason", trajectory.stop_reason === null ? "-" : words(trajectory.stop_reason),
      trajectory.stop_reason === "completed" || trajectory.stop_reason === null ? "" : "warn"],
    ["Advantage", format(trajectory.advantage), ""],
    ["Turns", String(trajectory.turns.length), ""],
    ["Tokens written", tokens(trajectory).toLocaleString("en"), ""],
  ];
  const names = Object.keys(trajectory.rewards);
  if (names.length > 1) {
    for (const name of names) facts.push([visible(name), format(trajectory.rewards[name]), ""]);
  }
  const children = [
    make("h2", {}, visible(trajectory.task)),
    make("p", { class: "where" }, where.join(" \u00b7 ")),
    make("dl", { class: "facts" }, ...facts.map(([name, value, kind]) =>
      make("div", {}, make("dt", {}, name), make("dd", { class: kind }, value)))),
  ];
  if (trajectory.turns.length) children.push(overview(trajectory));
  else children.push(make("p", { class: "none" }, "The episode ended before the policy wrote anything."));
  if (trajectory.info !== null) {
    const info = folded("What the environment reported", trajectory.info);
    const box = make("section", { class: "turn" }, info);
    info.open ||= trajectory.turns.length === 0 || text(trajectory.info).length < 400;
    children.push(box);
  }
  children.push(...trajectory.turns.map((turn, at) => turnCard(turn, at + 1)));
  children.push(make("p", { class: "help" },
    make("kbd", {}, "\u2191"), " ", make("kbd", {}, "\u2193"), " previous and next trajectory, ",
    make("kbd", {}, "\u2190"), " ", make("kbd", {}, "\u2192"), " previous and next turn, ",
    make("kbd", {}, "e"), " unfold everything, ", make("kbd", {}, "/"), " search"));
  detail.replaceChildren(...children);
}

function overview(trajectory) {
  const trained = trajectory.turns.some((turn) => turn.ratio !== null);
  const sampled = trajectory.turns.some((turn) => turn.logp !== null);
  const rewarded = trajectory.turns.some((turn) => turn.turn_reward !== null);
  const heads = ["Turn", "Context", "Action"];
  if (sampled) heads.push("Log-prob / token");
  if (rewarded) heads.push("Reward");
  if (trained) heads.push("Ratio", "M", "M / A");
  const head = make("tr", {}, ...heads.map((name) => make("th", {}, name)), make("th", { class: "calls" }, "Calls"));
  const rows = trajectory.turns.map((turn, at) => {
    const link = make("a", {}, String(at + 1));
    link.href = "#";
    link.addEventListener("click", (event) => {
      event.preventDefault();
      bring(cards()[at]);
    });
    const cells = [make("td", {}, link), make("td", {}, turn.context_tokens.toLocaleString("en")),
      make("td", {}, turn.action_tokens.toLocaleString("en"))];
    if (sampled) cells.push(make("td", {}, format(turn.logp)));
    if (rewarded) cells.push(make("td", {}, format(turn.turn_reward)));
    if (trained) {
      cells.push(make("td", { class: turn.clipped ? "warn" : "", title: turn.clipped ? "clipped" : "" },
        format(turn.ratio, 4) + (turn.clipped ? " \u2702" : "")));
      cells.push(make("td", {}, format(turn.turn_weight)), make("td", {}, format(turn.relative_turn_weight, 4)));
    }
    cells.push(make("td", { class: "calls" }, turn.calls.map((call) => visible(call.name)).join(", ") || "-"));
    return make("tr", {}, ...cells);
  });
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function cards() {
  return detail.querySelectorAll("section.turn[data-turn]");
}

function turnCard(turn, at) {
  const chips = [count(turn.action_tokens, "token")];
  if (turn.logp !== null) chips.push(`log-prob ${format(turn.logp)}`);
  if (turn.turn_reward !== null) chips.push(`reward ${format(turn.turn_reward)}`);
  const head = make("h3", {}, `Turn ${at}`, ...chips.map((chip) => make("span", {}, chip)));
  if (turn.ratio !== null) {
    head.append(make("span", { class: turn.clipped ? "warn" : "", title: "sequence ratio in the loss" },
      `ratio ${format(turn.ratio, 4)}${turn.clipped ? ", clipped" : ""}`));
    head.append(make("span", { title: "turn weight M, and M / A" },
      `M ${format(turn.turn_weight)} (${format(turn.relative_turn_weight, 4)} A)`));
  }
  const card = make("section", { class: "turn" }, head);
  card.dataset.turn = String(at);
  const fresh = turn.context_tokens - turn.kept;
  card.append(folded(at === 1
    ? `Context: ${count(fresh, "token")}`
    : `Context: ${count(fresh, "new token")} after ${turn.kept.toLocaleString("en")} shared with turn ${at - 1}`,
  turn.context, true));
  const parsed = turn.content !== null || turn.reasoning !== null || turn.calls.length > 0;
  if (text(turn.reasoning)) {
    const reasoning = folded("Reasoning", turn.reasoning);
    reasoning.classList.add("reasoning");
    reasoning.open = true;
    card.append(reasoning);
  }
  if (text(turn.content) || !parsed) {
    card.append(part("Response", [block(parsed ? turn.content : turn.action)], "action"));
  }
  if (turn.calls.length) {
    card.append(part(turn.calls.length === 1 ? "Call" : "Calls", turn.calls.map((call) =>
      make("div", { class: "call" }, make("b", {}, visible(call.name)), block(call.arguments))), "action"));
  }
  if (parsed) card.append(folded("As written, with special tokens", turn.action));
  for (const message of turn.observations || []) {
    card.append(part(visible(message.role), [block(message.content)], ""));
  }
  return card;
}

function part(title, children, kind) {
  return make("div", { class: `part ${kind}` }, make("h4", {}, title), ...children);
}

// The text of a folded part is drawn when it is opened for the first time. Of a context the end matters most.
function folded(title, value, fromEnd = false) {
  const details = make("details", { class: "part" }, make("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const pre = block(value);
    details.append(pre);
    const found = pre.querySelector("mark");
    if (found) pre.scrollTop = found.offsetTop - pre.offsetTop - 40;
    else if (fromEnd) pre.scrollTop = pre.scrollHeight;
  });
  const needle = input.search.value.toLowerCase();
  details.open = needle !== "" && (text(value) || "").toLowerCase().includes(needle);
  return details;
}

function block(value) {
  const content = visible(text(value) || "");
  if (content === "") return make("pre", { class: "none" }, "(empty)");
  const pre = make("pre");
  const needle = input.search.value.toLowerCase();
  const lower = content.toLowerCase();
  if (needle === "" || lower.length !== content.length) {
    pre.textContent = content;
    return pre;
  }
  let from = 0;
  for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, from)) {
    pre.append(content.slice(from, at), make("mark", {}, content.slice(at, at + needle.length)));
    from = at + needle.length;
  }
  pre.append(content.slice(from));
  return pre;
}

// On a narrow screen the whole page scrolls.
function bring(card) {
  if (detail.scrollHeight <= detail.clientHeight) card.scrollIntoView();
  else detail.scrollTop += card.getBoundingClientRect().top - detail.getBoundingClientRect().top;
  explorer.scrollIntoView({ block: "nearest" });
}

function jump(step) {
  const all = [...cards()];
  const top = detail.getBoundingClientRect().top;
  const tops = all.map((card) => card.getBoundingClientRect().top - top);
  const next = step > 0 ? tops.findIndex((value) => value > 5) : tops.findLastIndex((value) => value < -5);
  if (next >= 0) bring(all[next]);
  else if (step < 0) detail.scrollTop = 0;
}

// ---- Wiring ----

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  if (event.key === "Escape" && typing) {
    event.target.blur();
    return;
  }
  if (typing) return;
  const actions = {
    ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
    ArrowRight: () => jump(1), ArrowLeft: () => jump(-1),
    Home: () => move(-shown.length), End: () => move(shown.length),
    "/": () => input.search.focus(),
    e: () => {
      const all = [...detail.querySelectorAll("details")];
      const open = all.some((details) => !details.open);
      for (const details of all) details.open = open;
    },
  };
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
});

fill(input.split, "Split", distinct("split"));
fill(input.iteration, "Iteration", distinct("iteration"));
fill(input.category, "Category", distinct("category"));
fill(input.stop, "Stop reason", distinct("stop_reason"));
for (const [value, [label]] of Object.entries(SORTS)) input.sort.append(new Option(label, value));
for (const task of distinct("task")) document.getElementById("tasks").append(new Option("", task));
input.success.hidden = !trajectories.some((t) => t.success !== null);

form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));
update();
