// The text: every token in the colour of its place, a strip of all positions, and the token pointed at.

const spans = [];

// What a token shows: its text, with signs for line ends, tabs and control characters.
function drawn(text) {
  const signs = { "\n": "↵", "\t": "⇥" };
  return text.split(/([\n\t\r\u0000-\u0008\u000b-\u001f\u007f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff])/).flatMap((part, index) => {
    if (index % 2 === 0) return part ? [part] : [];
    const sign = signs[part] || `U+${part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return [el("i", { "data-s": sign }, signs[part] ? part : "")];
  });
}

function buildTokens() {
  const most = moments[moments.length - 1].tokens;
  for (let i = 0; i < most; i++) {
    const span = el("span", { role: "option", tabIndex: -1 }, ...drawn(data.texts[i]));
    span.number = i;
    spans.push(span);
  }
  const generated = el("div", { id: "generated", role: "presentation" }, "Generated");
  byId("tokens").append(...spans.slice(0, data.prompt), ...(most > data.prompt ? [generated] : []), ...spans.slice(data.prompt));
  spans[0].tabIndex = 0;
  const at = (event) => (event.target.closest("#tokens span") || {}).number;
  const area = byId("tokens");
  area.addEventListener("pointerover", (event) => { if (!state.pinned && at(event) !== undefined) point(at(event)); });
  area.addEventListener("click", (event) => { if (at(event) !== undefined) focusToken(at(event), true); });
  area.addEventListener("focusin", (event) => { if (at(event) !== undefined) { point(at(event)); roam(at(event)); } });
  area.addEventListener("keydown", onKey);
  byId("strip").addEventListener("click", (event) => {
    const box = byId("strip").getBoundingClientRect();
    focusToken(Math.min(now().tokens - 1, Math.floor(((event.clientX - box.left) / box.width) * now().tokens)), true);
  });
  new ResizeObserver(() => {
    byId("token").style.minHeight = "";
    document.documentElement.style.setProperty("--choice", `${byId("choice").offsetHeight}px`);
    drawStrip();
  }).observe(byId("choice"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawStrip);
}

function onKey(event) {
  const i = state.token, last = now().tokens - 1;
  const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: last, PageUp: i - 50, PageDown: i + 50 }[event.key];
  if (to !== undefined) focusToken(Math.max(0, Math.min(last, to)), state.pinned);
  else if (event.key === "ArrowUp" || event.key === "ArrowDown") focusToken(nextLine(i, event.key === "ArrowUp" ? -1 : 1), state.pinned);
  else if (event.key === "Enter" || event.key === " ") pin(!state.pinned);
  else if (event.key === "Escape") pin(false);
  else return;
  event.preventDefault();
}

// The token above or below: in the next line, the first one that is not left of this one.
function nextLine(from, step) {
  const start = spans[from].getClientRects()[0], left = start.left;
  let line = start.top, best = from;
  for (let i = from + step; i >= 0 && i < now().tokens; i += step) {
    const box = spans[i].getClientRects()[0];
    if (Math.abs(box.top - start.top) < 2) continue;
    if (best !== from && Math.abs(box.top - line) > 2) break;
    line = box.top;
    if (best === from || Math.abs(box.left - left) < Math.abs(spans[best].getClientRects()[0].left - left)) best = i;
  }
  return best;
}

function roam(i) {
  for (const span of byId("tokens").querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
  spans[i].tabIndex = 0;
}

function focusToken(i, pin) {
  state.pinned = pin;
  spans[i].focus({ preventScroll: true });
  spans[i].scrollIntoView({ block: "nearest" });
  point(i);
}

function pin(pinned) {
  state.pinned = pinned;
  showToken();
}

function point(i) {
  if (state.token >= 0) {
    spans[state.token].classList.remove("here");
    spans[state.token].removeAttribute("aria-selected");
  }
  state.token = i;
  showToken();
}

function showTokens() {
  const moment = now(), chosen = rowsOf(state.layer, state.head), single = chosen.length === 1 ? chosen[0] : -1;
  spans.forEach((span, i) => {
    span.hidden = i >= moment.tokens;
    if (span.hidden) return;
    if (single >= 0) {
      span.className = PLACES[moment.place[single * moment.tokens + i]].key;
      return;
    }
    const found = countsOfToken(moment, chosen, i), total = chosen.length;
    span.className = found[3] === total ? "mix gone" : "mix";
    let sum = 0;
    ["--a", "--b", "--c"].forEach((name, place) => {
      sum += found[place];
      span.style.setProperty(name, `${(100 * sum) / total}%`);
    });
  });
  const divider = byId("generated");
  if (divider) divider.hidden = moment.tokens <= data.prompt;
  if (state.token >= moment.tokens) state.token = -1;
  drawStrip();
}

function showLater() {
  const moment = now(), texts = data.texts.slice(moment.tokens, moment.tokens + moment.later);
  const source = moment.tokens < data.prompt || data.laterIsGiven ? "the text goes on" : "the model wrote next";
  byId("later").replaceChildren(
    el("p", { className: "quiet" }, `Not in this cache: the ${moment.later} later tokens whose attention is the measure (${source}).`),
    el("blockquote", {}, texts.join("")));
}

function drawStrip() {
  const canvas = byId("strip").querySelector("canvas"), moment = now(), chosen = rowsOf(state.layer, state.head);
  const scale = window.devicePixelRatio || 1, width = Math.max(1, Math.round(canvas.clientWidth * scale)), height = Math.round(24 * scale);
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const colours = PLACES.map((place) => style.getPropertyValue(`--bar-${place.key}`).trim());
  const shares = [...Array(moment.tokens)].map((none, i) => countsOfToken(moment, chosen, i));
  for (let x = 0; x < width; x++) {
    const first = Math.floor((x * moment.tokens) / width), end = Math.max(first + 1, Math.floor(((x + 1) * moment.tokens) / width));
    let top = 0;
    for (let place = 0; place < 4; place++) {
      let sum = 0;
      for (let i = first; i < end; i++) sum += shares[i][place];
      const part = (height * sum) / ((end - first) * chosen.length);
      pen.fillStyle = colours[place];
      pen.fillRect(x, top, 1, part);
      top += part;
    }
  }
}

// ---- the token pointed at ----

function showToken() {
  const panel = byId("token"), i = state.token, mark = byId("mark");
  mark.hidden = i < 0;
  panel.className = i < 0 ? "idle" : "";
  if (i < 0) {
    panel.replaceChildren(el("h3", {}, "No token chosen"), el("p", { className: "quiet" }, "Point at a token, or move to the text with Tab and use the arrow keys. A click or Enter pins it, Escape lets go."));
    return;
  }
  mark.style.left = `${(100 * (i + 0.5)) / now().tokens}%`;
  spans[i].classList.add("here");
  spans[i].setAttribute("aria-selected", "true");
  const chosen = rowsOf(state.layer, state.head), found = countsOfToken(now(), chosen, i);
  const said = PLACES.map((place, index) => [placeName(index, state.layer), found[index]]).filter((one) => one[1]);
  const places = chosen.length === 1 ? said[0][0] : said.map(([name, many]) => `${name} ${many}`).join(", ");
  spans[i].setAttribute("aria-label", `${data.texts[i] || "part of a character"}, position ${i}: ${places}`);
  const close = el("button", { type: "button" }, state.pinned ? "Unpin" : "Close");
  close.addEventListener("click", () => { if (state.pinned) pin(false); else point(-1); });
  const parts = [
    close,
    el("h3", {}, el("code", {}, ...(data.texts[i] ? drawn(data.texts[i]) : ["▪"]))),
    el("p", { className: "quiet" }, `position ${number(i)} of ${number(now().tokens)}, id ${data.ids[i]}, ${i < data.prompt ? "prompt" : "generated"}`),
  ];
  if (!data.texts[i]) parts.push(el("p", {}, `Some bytes of “${wholeOf(i)}”, which takes several tokens.`));
  if (chosen.length > 1) parts.push(el("p", {}, `In ${chosen.length} heads: ${said.map(([name, many]) => `${name} ${many} (${percent(many / chosen.length)})`).join(", ")}.`));
  parts.push(state.layer < 0 ? lettersOf(i) : headsOf(i));
  panel.replaceChildren(...parts);
  panel.style.minHeight = `${panel.offsetHeight}px`; // what stands below does not jump from token to token
}

function wholeOf(i) {
  for (let j = i; j < data.texts.length; j++) if (data.texts[j]) return data.texts[j];
  return "";
}

// The heads of the chosen layer: place, score, later attention.
function headsOf(i) {
  const moment = now(), before = moments[0];
  const lines = rowsOf(state.layer, -1).map((row) => {
    const place = moment.place[row * moment.tokens + i];
    const was = state.moment > 0 && i < before.tokens ? before.place[row * before.tokens + i] : place;
    const name = was === place ? PLACES[place].key : `${PLACES[was].key} → ${PLACES[place].key}`;
    return { cells: [String(rows[row].head), name, multiple(scoreOf(moment, row, i)) || "none", multiple(attentionOf(moment, row, i))], chosen: rows[row].head === state.head };
  });
  const made = el("div", {}, table(["head", "place", "score", "later attention"], lines));
  made.append(el("p", { className: "quiet" }, "Score and attention in multiples of uniform attention."));
  return made;
}

// All layers and heads as letters: columns are layers, lines heads.
function lettersOf(i) {
  const moment = now(), made = el("div", { className: "letters", tabIndex: 0, role: "img", "aria-label": "Place of the token by head (lines) and layer (columns)" });
  for (let head = 0; head < mostHeads; head++) {
    made.append(`head ${String(head).padEnd(3)}`);
    data.layers.forEach((layer, index) => {
      const place = head < layer.heads ? PLACES[moment.place[(firstRow[index] + head) * moment.tokens + i]] : { key: "", letter: " " };
      made.append(el("b", { className: place.key }, place.letter));
    });
    made.append("\n");
  }
  return el("div", {}, made, el("p", { className: "quiet" }, "H high, L low, W window, – pruned; a column for every layer. Choose a layer for scores."));
}

// ---- begin ----

showFacts();
buildHeat();
buildTokens();
byId("moment-label").hidden = moments.length < 2;
for (const name of ["moment", "layer", "head"]) {
  byId(name).addEventListener("change", (event) => choose({ [name]: Number(event.target.value) }));
}
window.addEventListener("hashchange", () => choose(readHash()));
showMoment();
choose(readHash());
