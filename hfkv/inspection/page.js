// What the page shows: the choice of cache, layer and head, and everything that follows from it.

const state = { moment: moments.length - 1, layer: -1, head: -1, metric: "", token: -1, pinned: false };
const byId = (id) => document.getElementById(id);
const now = () => moments[state.moment];

// An element with properties (or, with a dash, attributes) and children; text is always text.
function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function table(heads, lines, className = "plain") {
  const head = el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text))));
  const body = lines.map(({ cells, chosen = false }) =>
    el("tr", { className: chosen ? "chosen" : "" }, ...cells.map((cell) => el("td", {}, cell))));
  return el("table", { className }, head, el("tbody", {}, ...body));
}

const layerTitle = (layer) => (layer < 0 ? "all layers" : `layer ${data.layers[layer].index}`);
const headTitle = (head) => (head < 0 ? "all heads" : `head ${head}`);
const choiceTitle = () => `${layerTitle(state.layer)}, ${headTitle(state.head)}`;
const momentTitle = (moment) =>
  moment.tokens === data.prompt ? "after the prompt" : `after ${number(moment.tokens - data.prompt)} generated tokens`;

// ---- summary, and what does not change ----

function showSummary() {
  const moment = now(), all = rowsOf(-1, -1), kept = mass(moment, all), total = counts(moment, all);
  const share = (place) => total[place] / (moment.tokens * rows.length);
  const tiles = [
    ["Physical bytes", size(moment.physical), `of ${size(moment.exact)} exact`],
    ["Ratio", (moment.physical / moment.exact).toFixed(3), `${(moment.exact / moment.physical).toFixed(2)} times smaller`],
    ["Layers compressed", `${data.layers.length} of ${data.layerCount}`, data.plain.length ? "see below for the others" : "none is left out"],
    ["Tokens", number(moment.tokens), momentTitle(moment)],
    ["Tokens pruned", percent(share(3)), "mean over layers and heads"],
    ["Attention kept", percent(1 - kept[3]), `of what ${moment.later} later tokens look at`],
  ];
  byId("summary").replaceChildren(...tiles.map(([name, value, note]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)))));
}

function showFacts() {
  const { setting, model, dtype, device, prompt } = data;
  byId("subtitle").textContent = `${model}, ${dtype} on ${device} · setting ${setting} · prompt of ${number(prompt)} tokens`;
  document.title = `${setting}: what the KV cache keeps (${model})`;
  byId("config").textContent = data.config;
  byId("versions").textContent = `${data.versions}; kernels: ${data.backend}`;
  const reasons = new Map();
  for (const [index, reason] of data.plain) reasons.set(reason, [...(reasons.get(reason) || []), index]);
  const plain = [...reasons].map(([reason, layers]) =>
    el("li", {}, `Layer${layers.length > 1 ? "s" : ""} ${layers.join(", ")}: ${reason}.`));
  plain.push(el("li", {}, "The newest tokens of every layer (the exact window) are kept in the model's own number format."));
  byId("plain").replaceChildren(
    el("p", {}, data.plain.length ? "transformers' own cache layers, not part of the bytes above:" : "Every layer is compressed."),
    el("ul", {}, ...plain));
  const later = data.laterIsGiven ? "the tokens that follow in the text" : "the tokens that the model wrote next with this cache";
  byId("reading").replaceChildren(...[
    "For every layer and key/value head each token is in one place: a tier of packed codes, the window of newest tokens, which stays exact, or nowhere any more (pruned).",
    "Score is the significance stored with the token when the cache last chose tiers: the attention it received, in multiples of what uniform attention would give. Tokens in the window, pruned ones and settings that do not select have none.",
    `Later attention is what the queries of tokens that the cache has not seen look at (here: ${later}), computed on exact keys, of the attention that falls on the tokens in question; the mean over those queries and over the query heads that share the key/value head. Attention kept is the part of it that falls on tokens which are still stored.`,
    "A little attention lost is not a little lost: what no later token has looked at yet may be what the next question is about.",
    "Bytes are physical: everything held, codes with their metadata, free slots, window, queries, tables and free pages.",
  ].map((text) => el("p", {}, text)));
}

function showBytes() {
  const moment = now(), all = rowsOf(-1, -1);
  byId("bytes").replaceChildren(table(["kind", "bytes", "share"], Object.entries(moment.bytes).map(([name, count]) =>
    ({ cells: [name.replace("_", " "), number(count), percent(count / moment.physical)] }))));
  if (moment.plainBytes) byId("bytes").append(el("p", {}, `Not compressed, beside it: ${size(moment.plainBytes)}.`));
  const lines = all.map((row) => {
    const { layer, head } = rows[row], own = bytes(moment, [row]), kept = mass(moment, [row]);
    const figures = [...counts(moment, [row]).map(number), number(own.pages), number(own.window), percent(1 - kept[3]), percent(kept[0])];
    return { cells: [String(data.layers[layer].index), String(head), ...figures] };
  });
  const heads = ["layer", "head", ...PLACES.map((place) => place.key), "bytes of pages", "bytes of window", "attention kept", "on high tokens"];
  byId("all").replaceChildren(table(heads, lines));
}

// ---- heat map ----

const METRICS = {
  kept: ["attention kept", "Share of the later tokens' attention that falls on tokens which are still stored.", (m, r) => 1 - mass(m, r)[3]],
  high: ["attention on high tokens", "Share of the later tokens' attention that falls on tokens of the first tier.", (m, r) => mass(m, r)[0]],
  tokensHigh: ["tokens: high", "Share of the tokens in the first tier.", (m, r) => counts(m, r)[0] / (m.tokens * r.length)],
  tokensLow: ["tokens: low", "Share of the tokens in the second tier.", (m, r) => counts(m, r)[1] / (m.tokens * r.length)],
  tokensPruned: ["tokens: pruned", "Share of the tokens that are no longer stored.", (m, r) => counts(m, r)[3] / (m.tokens * r.length)],
  bytes: ["bytes", "A head's pages and its part of the exact window, in percent of what the exact cache takes.", (m, r) => {
    const own = bytes(m, r);
    return (own.pages + own.window) / own.exact;
  }],
};
const heat = { buttons: [], at: [0, 0] }; // buttons by line (0: layers' own) and column (0: heads' own)

function buildHeat() {
  const column = new Map(data.layers.map((layer, position) => [layer.index, position]));
  const indices = [...Array(data.layerCount).keys()];
  const button = (text, layer, head, line, place) => {
    const made = el("button", { type: "button", tabIndex: -1, "aria-label": `${layerTitle(layer)}, ${headTitle(head)}` }, text);
    made.addEventListener("click", () => { heat.at = [line, place]; choose({ layer, head }); });
    (heat.buttons[line] = heat.buttons[line] || [])[place] = made;
    made.choice = [layer, head];
    return made;
  };
  const line = (head) => indices.map((index) => {
    const layer = column.get(index);
    if (layer === undefined) return el(head < 0 ? "th" : "td", { className: "none", title: "not compressed" }, head < 0 ? String(index) : "");
    if (head >= data.layers[layer].heads) return el("td");
    if (head < 0) return el("th", { scope: "col" }, button(String(index), layer, -1, 0, layer + 1));
    return el("td", {}, button("", layer, head, head + 1, layer + 1));
  });
  const lines = [el("tr", {}, el("th", {}, button("all", -1, -1, 0, 0)), ...line(-1))];
  for (let head = 0; head < mostHeads; head++) {
    lines.push(el("tr", {}, el("th", { scope: "row" }, button(`head ${head}`, -1, head, head + 1, 0)), ...line(head)));
  }
  byId("heat").replaceChildren(el("table", {}, el("caption", { className: "unseen" }, "Heat map: layers by heads"),
    el("thead", {}, lines[0]), el("tbody", {}, ...lines.slice(1))));
  byId("heat").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const to = (heat.buttons[heat.at[0] + step[0]] || [])[heat.at[1] + step[1]];
    if (to) focusHeat(heat.at[0] + step[0], heat.at[1] + step[1], true);
  });
  const pruned = moments.some((moment) => moment.place.includes(3)), low = data.layers.some((layer) => layer.tiers.length > 1);
  for (const [key, [name]] of Object.entries(METRICS)) {
    if ((pruned || !["kept", "tokensPruned"].includes(key)) && (low || key !== "tokensLow")) {
      byId("metric").append(el("option", { value: key }, name));
    }
  }
  state.metric = byId("metric").value;
  byId("metric").addEventListener("change", (event) => { state.metric = event.target.value; showHeat(); });
}

function focusHeat(line, place, move) {
  for (const one of heat.buttons.flat()) one.tabIndex = -1;
  heat.at = [line, place];
  heat.buttons[line][place].tabIndex = 0;
  if (move) heat.buttons[line][place].focus();
}

function showHeat() {
  const [name, meaning, measure] = METRICS[state.metric], moment = now();
  const values = rows.map((row, index) => measure(moment, [index]));
  const least = Math.min(...values), most = Math.max(...values);
  rows.forEach((row, index) => {
    const made = heat.buttons[row.head + 1][row.layer + 1], value = values[index];
    const step = most > least ? Math.min(6, Math.floor((7 * (value - least)) / (most - least))) : 3;
    made.className = `s${step}`;
    made.textContent = brief(value, most - least < 0.1);
    made.title = `${layerTitle(row.layer)}, ${headTitle(row.head)}: ${name} ${percent(value)}`;
    made.setAttribute("aria-label", made.title);
  });
  byId("metric-meaning").textContent = `${meaning} In percent.`;
  const swatches = [0, 1, 2, 3, 4, 5, 6].map((step) => el("i", { className: `s${step}` }));
  byId("scale").replaceChildren(el("span", {}, percent(least)), ...(most > least ? swatches : [swatches[3]]), el("span", {}, percent(most)));
  for (const made of heat.buttons.flat()) {
    made.setAttribute("aria-pressed", String(made.choice[0] === state.layer && made.choice[1] === state.head));
  }
  focusHeat(heat.at[0], heat.at[1], false);
}

// ---- the choice ----

function options(list, entries, chosen) {
  list.replaceChildren(...entries.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
  list.value = chosen;
}

// Change the choice and show what follows; a head that the layer does not have becomes all heads.
function choose(change) {
  const moved = "moment" in change && change.moment !== state.moment;
  Object.assign(state, change);
  byId("token").style.minHeight = "";
  const heads = state.layer < 0 ? mostHeads : data.layers[state.layer].heads;
  if (state.head >= heads) state.head = -1;
  options(byId("moment"), moments.map((moment, index) => [index, momentTitle(moment)]), state.moment);
  options(byId("layer"), [[-1, "all"], ...data.layers.map((layer, index) => [index, layer.index])], state.layer);
  options(byId("head"), [[-1, "all"], ...[...Array(heads).keys()].map((head) => [head, head])], state.head);
  if (moved) showMoment();
  showHeat();
  showLegend();
  showTokens();
  showFigures();
  showToken();
  const layer = state.layer < 0 ? "all" : data.layers[state.layer].index;
  const hash = `#cache=${state.moment}&layer=${layer}&head=${state.head < 0 ? "all" : state.head}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function showMoment() {
  showSummary();
  showBytes();
  showLater();
}

function showLegend() {
  const found = counts(now(), rowsOf(state.layer, state.head));
  byId("legend").replaceChildren(...PLACES.flatMap((place, index) => {
    if (!found[index] && place.key !== "high") return [];
    const sample = el("span", { className: `sample ${place.key}` }, placeName(index, state.layer));
    return [el("li", { "data-place": place.key }, sample, " ", el("b", {}, number(found[index])))];
  }));
}

function showFigures() {
  const moment = now(), chosen = rowsOf(state.layer, state.head), found = counts(moment, chosen), kept = mass(moment, chosen);
  const total = moment.tokens * chosen.length, own = bytes(moment, chosen);
  const lines = PLACES.map((place, index) => ({ cells: [placeName(index, state.layer), number(found[index]), percent(found[index] / total), percent(kept[index])] }));
  const title = choiceTitle();
  const parts = [
    el("h3", {}, title[0].toUpperCase() + title.slice(1)),
    ...(chosen.length > 1 ? [el("p", { className: "quiet" }, `Tokens of ${chosen.length} heads together.`)] : []),
    table(["", "tokens", "share", "later attention"], lines.filter((line, index) => found[index])),
    el("p", {}, `Pages ${size(own.pages)}, window ${size(own.window)}: ${percent((own.pages + own.window) / own.exact)} of ${size(own.exact)} exact.`),
  ];
  if (state.layer >= 0 && state.head < 0) {
    const layer = moment.layers[state.layer];
    parts.push(el("p", {}, `The layer in all, with queries and tables: ${size(layer.physical)}.`));
  }
  if (state.moment > 0) {
    const changed = moves(moments[0], moment, chosen).map(([from, to, many]) => el("li", {}, `${PLACES[from].key} → ${PLACES[to].key}: ${number(many)}`));
    parts.push(el("p", {}, "The prompt's tokens since the prompt:"), el("ul", {}, ...(changed.length ? changed : [el("li", {}, "no change")])));
  }
  byId("figures").replaceChildren(...parts);
}

function readHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const layer = data.layers.findIndex((one) => String(one.index) === wanted.get("layer"));
  const head = /^\d+$/.test(wanted.get("head") || "") ? Number(wanted.get("head")) : -1;
  const moment = Number(wanted.get("cache") || moments.length - 1);
  return { layer, head, moment: moment in moments ? moment : moments.length - 1 };
}
