"use strict";
const look = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const HUES = [255, 35, 150, 320, 85, 200, 5, 120];
const KINDS = { prompt: "prompts", text: "text", latent: "latent steps", answer: "answer", message: "text agents", reads: "attention" };
const SHADES = [["p", "probability"], ["entropy", "entropy, nats"], ["norm", "norm of the hidden state"],
  ["embedding", "norm of the embedding"], ["gradient", "norm of the gradient"], ["values", "norm of values"], ["keys", "norm of keys"]];

// ---- figures --------------------------------------------------------------------------------------------------------

const units = [];  // {block, step}: step null for a block that is one unit
const rowsBefore = [];  // by block, of the rows of all blocks
look.blocks.forEach((block, b) => {
  block.firstUnit = units.length;
  if (block.steps.length) block.steps.forEach((step, s) => units.push({ block: b, step: s }));
  else units.push({ block: b, step: null });
  rowsBefore.push(b ? rowsBefore[b - 1] + look.blocks[b - 1].rows : 0);
});
const blocksOf = (lane) => look.blocks.map((_, b) => b).filter((b) => look.blocks[b].agent === lane);
const unitsOf = (b) => units.map((_, u) => u).filter((u) => units[u].block === b);
const mean = (lists) => lists[0].map((_, i) => lists.reduce((sum, x) => sum + x[i], 0) / lists.length);
let layer = -1;  // -1: the mean of all
function massOf(some) {  // [1 + blocks]; null at a layer that the model of these units, which one agent wrote, does not have
  if (layer >= look.attention[some[0]].length) return null;
  return mean(some.map((u) => layer < 0 ? mean(look.attention[u]) : look.attention[u][layer]));
}
const noLayer = () => `its model has no layer ${layer}`;
function speaking(lane) {  // the units of a lane that say something, or all
  const own = blocksOf(lane), say = own.filter((b) => look.blocks[b].steps.length);
  return (say.length ? say : own).flatMap(unitsOf);
}
function byLane(mass) {  // [1 + blocks] -> [1 + lanes]
  const out = [mass[0], ...look.lanes.map(() => 0)];
  look.blocks.forEach((block, b) => { out[1 + block.agent] += mass[1 + b]; });
  return out;
}

// ---- words ----------------------------------------------------------------------------------------------------------

const percent = (x) => x >= 0.0995 ? `${Math.round(100 * x)} %` : x >= 0.0005 ? `${(100 * x).toFixed(1)} %` : x ? "< 0.1 %" : "0 %";
const number = (x) => x === null || x === undefined ? "not finite" : x !== 0 && (Math.abs(x) >= 1e4 || Math.abs(x) < 1e-2) ? x.toExponential(1) : String(+x.toPrecision(3));
const odd = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;  // what hides or turns text
const plain = (text) => text.replace(odd, (c) => c === "\t" ? "→" : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
function shown(text, exact = false) {  // a token alone. exact: with the spaces around it
  const out = plain(text).replace(/\n/g, "↵");
  return (exact ? out.replace(/^ +(?=.)| +$/g, (spaces) => "·".repeat(spaces.length)) : out.trim()) || (out ? "␣" : "∅");
}
const kindName = (block) => block.kind === "latent" ? `${block.rows} latent step${block.rows === 1 ? "" : "s"}` : block.kind;
const tokens = (n) => `${n} token${n === 1 ? "" : "s"}`;
const blockName = (b) => `${look.lanes[look.blocks[b].agent].name} · ${look.blocks[b].kind}`;
function unitName({ block: b, step: s }) {
  const block = look.blocks[b], name = look.lanes[block.agent].name;
  if (s === null) return `${name}, ${block.kind}, ${tokens(block.rows)}`;
  const what = block.kind === "latent" ? "latent step" : "token", step = block.steps[s];
  const says = step.text === null ? "" : `: ${shown(step.text)}, ${percent(step.p)}, entropy ${number(step.entropy)} nats`;
  return `${name}, ${what} ${s + 1} of ${block.steps.length}${says}`;
}

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("--")) node.style.setProperty(key, value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const hue = (lane) => ({ "--hue": HUES[lane % HUES.length] });
