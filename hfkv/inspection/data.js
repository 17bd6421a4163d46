"use strict";
// What the page holds and what can be asked of it. A row is one key/value head; rows count through all layers.

const data = JSON.parse(document.getElementById("data").textContent);

// The places of a token, in the order of every list of four figures; `code` is the stored number.
const PLACES = [
  { key: "high", code: 2, letter: "H" },
  { key: "low", code: 1, letter: "L" },
  { key: "window", code: 3, letter: "W" },
  { key: "pruned", code: 0, letter: "–" },
];
const PLACE_OF = [3, 1, 0, 2]; // by code

const rows = []; // {layer: number in data.layers, head}
const firstRow = data.layers.map((layer, number) => {
  const first = rows.length;
  for (let head = 0; head < layer.heads; head++) rows.push({ layer: number, head });
  return first;
});
const mostHeads = Math.max(...data.layers.map((layer) => layer.heads));

function bytesOf(base64) {
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

const moments = data.moments.map((stored) => {
  const packed = bytesOf(stored.tier), stride = Math.ceil(stored.tokens / 4);
  const place = new Uint8Array(rows.length * stored.tokens);
  for (let row = 0; row < rows.length; row++) {
    for (let i = 0; i < stored.tokens; i++) {
      const code = (packed[row * stride + (i >> 2)] >> (2 * (i & 3))) & 3;
      place[row * stored.tokens + i] = PLACE_OF[code];
    }
  }
  const score = stored.score === null ? null : new DataView(bytesOf(stored.score).buffer);
  return { ...stored, place, score, attention: bytesOf(stored.attention) };
});

// The rows of a choice; layer and head are numbers, or -1 for all.
function rowsOf(layer, head) {
  const found = [];
  rows.forEach((row, number) => {
    if ((layer < 0 || row.layer === layer) && (head < 0 || row.head === head)) found.push(number);
  });
  return found;
}

// Tokens of some rows in each place, in the order of PLACES.
function counts(moment, chosen) {
  const found = [0, 0, 0, 0];
  for (const row of chosen) {
    const end = (row + 1) * moment.tokens;
    for (let i = row * moment.tokens; i < end; i++) found[moment.place[i]]++;
  }
  return found;
}

// One token's rows in each place.
function countsOfToken(moment, chosen, token) {
  const found = [0, 0, 0, 0];
  for (const row of chosen) found[moment.place[row * moment.tokens + token]]++;
  return found;
}

// Share of the later tokens' attention that falls on each place, the mean over rows.
function mass(moment, chosen) {
  const found = [0, 0, 0, 0];
  for (const row of chosen) {
    const own = moment.layers[rows[row].layer].mass[rows[row].head];
    for (let i = 0; i < 4; i++) found[i] += own[i] / chosen.length;
  }
  return found;
}

// Bytes that belong to heads alone: their pages and their part of the exact window, beside the exact cache's.
function bytes(moment, chosen) {
  const found = { pages: 0, window: 0, exact: 0 };
  for (const row of chosen) {
    const { layer, head } = rows[row], own = moment.layers[layer];
    found.pages += own.pages[head];
    found.window += own.window;
    found.exact += own.exact / data.layers[layer].heads;
  }
  return found;
}

// The score stored with a token, NaN where there is none.
function scoreOf(moment, row, token) {
  if (moment.score === null) return NaN;
  const half = moment.score.getUint16(2 * (row * moment.tokens + token), true);
  const exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent === 31) return NaN;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
}

// Attention of the later tokens on a token, in multiples of what uniform attention would give; 0: next to none.
function attentionOf(moment, row, token) {
  const code = moment.attention[row * moment.tokens + token];
  return code ? data.attentionLeast * 2 ** ((code - 1) / data.attentionSteps) : 0;
}

// Moves of the prompt's tokens from one place to another between two moments: [[from, to, number], ...].
function moves(before, after, chosen) {
  const found = new Map();
  for (const row of chosen) {
    for (let i = 0; i < before.tokens; i++) {
      const from = before.place[row * before.tokens + i], to = after.place[row * after.tokens + i];
      if (from !== to) found.set(from * 4 + to, (found.get(from * 4 + to) || 0) + 1);
    }
  }
  return [...found].sort((a, b) => b[1] - a[1]).map(([key, number]) => [key >> 2, key & 3, number]);
}

// ---- figures as text ----

function percent(share) {
  if (share > 0 && share < 0.0005) return "<\u00a00.1\u00a0%";
  if (share < 1 && share > 0.9995) return ">\u00a099.9\u00a0%";
  return `${(100 * share).toFixed(share === 0 || share === 1 ? 0 : 1)}\u00a0%`;
}

// A percentage in the room of a cell, with a decimal where asked; only what is exactly none or all reads 0 or 100.
function brief(share, fine) {
  const value = 100 * share;
  if (value === 0 || value >= 100) return String(Math.round(value));
  if (value < 0.1) return "<.1";
  return fine || value < 1 || value > 99 ? (Math.floor(10 * value) / 10).toFixed(1) : String(Math.round(value));
}

function size(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; count >= 1024 && unit < 3; unit++) count /= 1024;
  return `${count.toFixed(unit === 0 ? 0 : count < 10 ? 2 : 1)} ${units[unit]}`;
}

function number(count) {
  return count.toLocaleString("en");
}

function multiple(value) {
  if (Number.isNaN(value)) return "";
  if (value === 0) return "0";
  return value >= 100 ? number(Math.round(value)) : value >= 0.001 ? String(+value.toPrecision(3)) : "< 0.001";
}

// The name of a place: a tier's with its bits where all the layers in question agree on them.
function placeName(place, layer) {
  const { key } = PLACES[place], own = layer < 0 ? data.layers : [data.layers[layer]];
  if (key === "window") return "exact window";
  if (key === "pruned") return "pruned";
  const names = new Set(own.map((one) => one.tiers[place]).filter(Boolean));
  const tiered = own.some((one) => one.tiers.length > 1);
  const name = tiered ? `${key} tier` : "packed";
  return names.size === 1 ? `${name} ${[...names][0]}` : name;
}
