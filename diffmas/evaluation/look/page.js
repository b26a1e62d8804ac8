// ---- lanes ----------------------------------------------------------------------------------------------------------

const nodes = [];  // of units
const tokenNodes = [];  // of rows
$("title").textContent = look.title;
for (const [name, text] of look.facts) {
  $("facts").append(el("div", { className: name === "answer" ? "main" : "" }, el("dt", { textContent: name }), el("dd", {}, ...textOf([text.trim().replace(/\n{2,}/g, "\n")], ""))));
}

function textOf(texts, name, row = null, own = null) {  // row: of the first one, where they are rows; own: what to begin with
  const text = el("div", { className: `text ${name}` });
  texts.forEach((t, i) => {
    const span = el("span", { textContent: plain(t), className: own && (i < own[0] || i >= own[1]) ? "around" : "" });
    if (row !== null) tokenNodes[row + i] = span;
    text.append(span);
  });
  const whole = (own ? texts.slice(...own) : texts).join("");
  if (!own && whole.length < 260 && whole.split("\n").length < 4) return [text];
  const more = el("button", { className: "more", type: "button", textContent: "show all of it" });
  more.onclick = () => { more.textContent = text.classList.toggle("all") ? "show less" : "show all of it"; };
  text.classList.add("long");
  return [text, more];
}

function stepsOf(block, b) {
  const list = el("ol", { className: "steps" });
  block.steps.forEach((step, s) => {
    const unit = block.firstUnit + s;
    const node = el("button", { type: "button", className: "unit step", textContent: step.text === null ? String(s + 1) : shown(step.text) });
    nodes[unit] = tokenNodes[rowsBefore[b] + s] = node;
    list.append(el("li", {}, node));
  });
  return list;
}

look.lanes.forEach((lane, l) => {
  const reads = lane.reads.length ? `reads ${lane.reads.map((r) => look.lanes[r].name).join(", ")}` : look.attention ? "reads nobody" : "";
  const box = el("article", { className: "lane", "aria-label": lane.name, ...hue(l) },
    el("header", {}, el("h3", { textContent: lane.name }), el("span", { className: "dim", textContent: reads })));
  for (const b of blocksOf(l)) {
    const block = look.blocks[b], row = el("div", { className: `block ${block.kind}`, "data-kind": block.kind });
    if (block.steps.length) {
      row.append(el("span", { className: "name", textContent: block.kind === "latent" ? kindName(block) : "answers" }), stepsOf(block, b));
    } else {
      const name = el("button", { type: "button", className: "name unit", textContent: `${block.kind}, ${block.rows}` });
      nodes[block.firstUnit] = name;
      row.append(name, ...textOf(block.texts, "", rowsBefore[b], block.own));
    }
    box.append(row);
  }
  if (!blocksOf(l).length) box.append(el("p", { className: "dim", textContent: "had no turn" }));
  if (lane.message !== null) {
    box.append(el("div", { className: "block message", "data-kind": "message" },
      el("span", { className: "name", textContent: `in text, ${lane.tokens}` }), ...textOf([lane.message || "(nothing)"], "said")));
  }
  if (look.attention && blocksOf(l).length) {
    box.append(el("div", { className: "reads", "data-kind": "reads" }, el("span", { className: "name", textContent: "attends to" }),
      el("div", { className: "bar", "aria-hidden": true }), el("div", { className: "shares" })));
  }
  $("lanes").append(box);
});
nodes.forEach((node, u) => {
  node.tabIndex = u ? -1 : 0;
  node.setAttribute("aria-label", unitName(units[u]));
  node.onmouseenter = () => preview(u);
  node.onfocus = () => { nodes.forEach((n, i) => { n.tabIndex = i === u ? 0 : -1; }); preview(u); };
  node.onclick = () => keep(u);
});
$("lanes").onmouseleave = () => preview(kept);

// ---- attention between lanes ----------------------------------------------------------------------------------------

function drawBars() {
  if (!look.attention) return;
  look.lanes.forEach((lane, l) => {
    const bar = $("lanes").children[l].querySelector(".bar"), shares = $("lanes").children[l].querySelector(".shares");
    if (!bar) return;
    const mass = massOf(speaking(l)), lanes = [...look.lanes.keys()].filter((i) => i !== l).concat(l), segments = [], said = [];
    if (!mass) {
      bar.replaceChildren();
      shares.replaceChildren(noLayer());
      return;
    }
    for (const i of lanes) {
      const sum = (steps) => blocksOf(i).reduce((x, b) => x + (Boolean(look.blocks[b].steps.length) === steps ? mass[1 + b] : 0), 0);
      const prompt = sum(false), told = sum(true), latent = told && i !== l ? `, latent ${percent(told)}` : "";
      if (prompt + told < 0.0005) continue;
      segments.push(el("i", { "--mass": prompt, className: "asked", ...hue(i) }), el("i", { "--mass": told, ...hue(i) }));
      said.push(el("span", { textContent: `${i === l ? "itself" : look.lanes[i].name} ${percent(prompt + told)}${latent}`, ...hue(i) }));
    }
    bar.replaceChildren(...segments, el("i", { "--mass": mass[0], className: "first" }));
    shares.replaceChildren(...said, el("span", { textContent: `first token ${percent(mass[0])}`, className: "first" }));
  });
}

function drawArcs() {
  const wide = $("board").clientWidth > 480 && look.attention && look.lanes.length > 1;
  const gutter = wide ? Math.min(96, 30 + 13 * look.lanes.length) : 0;
  $("board").style.setProperty("--gutter", `${gutter}px`);
  $("arcs").replaceChildren();
  if (!wide) return;
  const edges = [];
  look.lanes.forEach((_, reader) => {
    const mass = blocksOf(reader).length ? massOf(speaking(reader)) : null;
    if (mass) byLane(mass).slice(1).forEach((m, source) => { if (source !== reader && m > 0.002) edges.push({ source, reader, m }); });
  });
  const most = Math.max(...edges.map((e) => e.m), 1e-9), top = $("board").getBoundingClientRect().top;
  const middle = (l) => { const r = $("lanes").children[l].getBoundingClientRect(); return r.top - top + 18; };
  for (const { source, reader, m } of edges) {
    const a = middle(source), b = middle(reader) + 13 * source, x = gutter - 4;  // no two at one place
    const reach = x - Math.min(x - 6, 14 + (gutter - 24) * Math.abs(reader - source) / look.lanes.length);
    const group = svg("g", { "data-source": source, "data-reader": reader });
    const path = svg("path", { d: `M${x},${a} C${reach - 14},${a} ${reach - 14},${b} ${x - 7},${b}`, "stroke-width": 1 + 9 * m / most });
    const head = svg("polygon", { points: `${x - 8},${b - 5} ${x + 2},${b} ${x - 8},${b + 5}` });
    group.append(path, head);
    group.style.setProperty("--hue", HUES[source % HUES.length]);
    $("arcs").append(group);
  }
  markArcs();
}
let looked = null;  // the unit that is looked at
function markArcs() {
  const lane = looked === null ? null : look.blocks[units[looked].block].agent;
  $("arcs").classList.toggle("some", lane !== null);
  for (const g of $("arcs").children) g.classList.toggle("on", Number(g.dataset.reader) === lane || Number(g.dataset.source) === lane);
}
function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function drawMatrix() {
  if (!look.attention) return;
  const head = el("tr", {}, el("td", { className: "none" }),
    ...look.blocks.map((block, b) => el("th", { scope: "col", textContent: blockName(b), ...hue(block.agent) })), el("th", { scope: "col", textContent: "first token" }));
  const body = look.blocks.map((block, b) => {
    const [first, ...rest] = massOf(unitsOf(b)) ?? [];
    const cells = !rest.length ? [el("td", { className: "none", colSpan: look.blocks.length + 1, textContent: noLayer() })] : [...rest, first].map((m, i) => m === 0 ? el("td", { className: "none", textContent: "–" })
      : el("td", { textContent: percent(m), "--mass": m, ...(i < rest.length ? hue(look.blocks[i].agent) : {}) }));
    return el("tr", {}, el("th", { scope: "row", textContent: blockName(b), ...hue(block.agent) }), ...cells);
  });
  $("masses").replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
  $("matrix").hidden = false;
}

function drawGradients() {
  const norms = look.blocks.map((block) => block.gradient && Math.hypot(...block.gradient));
  if (!norms.some((x) => x)) return;
  const most = Math.max(...norms.filter((x) => x));
  $("gradients").hidden = false;
  $("gradient-bars").className = "bars";
  look.blocks.forEach((block, b) => { if (norms[b] !== null) $("gradient-bars").append(line(blockName(b), norms[b] / most, number(norms[b]), block.agent)); });
}

// ---- what is looked at ----------------------------------------------------------------------------------------------

function line(what, mass, text, lane, token = false) {
  return el("li", lane === null ? { className: "first" } : hue(lane), el("span", { className: token ? "what token" : "what", textContent: what, title: what }),
    el("span", { className: "line" }, el("i", { "--mass": mass })), el("span", { className: "number", textContent: text }));
}
function heat(title, named, most) {  // named: [name, lane or null, numbers by layer]
  const box = el("div", { className: "heat", role: "img", "aria-label": `${title}, layers 0 to ${named[0][2].length - 1}` });
  for (const [name, lane, by] of named) {
    box.append(el("span", { textContent: name, title: name }), el("div", lane === null ? { className: "first" } : hue(lane),
      ...by.map((x, i) => el("i", { "--mass": Math.sqrt(x / (most || 1)), className: i === layer ? "now" : "", title: `layer ${i}: ${number(x)}` }))));
  }
  return [el("h3", { textContent: title }), box];
}

function drawDetail(u) {
  const box = $("detail");
  box.classList.toggle("open", u !== null);
  if (u === null) {
    box.style.removeProperty("--hue");
    box.replaceChildren(el("h2", { textContent: "Look closer" }), el("p", { className: "dim", textContent: look.attention
      ? "Point at a prompt, a latent step or a token of the answer: what it is nearest to, how sure it is, and what it attends to." : "Point at a block or a latent step: how large its keys and values are." }));
    return;
  }
  const { block: b, step: s } = units[u], block = look.blocks[b], step = s === null ? null : block.steps[s];
  box.style.setProperty("--hue", HUES[block.agent % HUES.length]);
  const what = s === null ? `${block.kind}, ${tokens(block.rows)}` : `${block.kind === "latent" ? "latent step" : "token"} ${s + 1} of ${block.steps.length}`;
  const close = el("button", { id: "close", type: "button", textContent: "✕", "aria-label": "close" });
  close.onclick = () => { const at = kept ?? u; if (kept !== null) keep(kept); preview(null); nodes[at].focus({ preventScroll: true }); preview(null); };
  const parts = [close, el("h2", { textContent: `${look.lanes[block.agent].name} · ${what}` })];
  if (step && step.nearest.length) {
    parts.push(el("h3", { textContent: block.kind === "latent" ? "is nearest to" : "was chosen from" }),
      el("ul", { className: "bars" }, ...step.nearest.map(([t, p]) => line(shown(t, true), p, percent(p), block.agent, true))));
  }
  const facts = [["position", block.position + (s || 0) + (block.offset ? `, read at ${block.position + (s || 0) + block.offset}` : "")]];
  if (step) for (const [key, name] of SHADES) if (step[key] !== null && (key !== "p" || step.text !== null)) facts.push([name, key === "p" ? percent(step[key]) : number(step[key])]);
  if (block.gradient) facts.push(["gradient of the block's rows", number(Math.hypot(...block.gradient))]);
  parts.push(el("h3", { textContent: "numbers" }), el("dl", { className: "numbers" },
    ...facts.flatMap(([k, v]) => [el("dt", { textContent: k }), el("dd", { className: "number", textContent: v })])));
  if (look.attention) {
    const mass = massOf([u]), by = look.attention[u], names = ["first token", ...look.blocks.map((_, i) => blockName(i))], lane = [null, ...look.blocks.map((x) => x.agent)];
    const seen = [...names.keys()].slice(1).concat(0).filter((i) => by.some((at) => at[i] > 0));
    parts.push(el("h3", { textContent: `attends to, ${layerName()}` }), mass ? el("ul", { className: "bars" }, ...seen.map((i) => line(names[i], mass[i], percent(mass[i]), lane[i])))
      : el("p", { className: "dim", textContent: noLayer() }));
    const some = seen.map((i) => [names[i], lane[i], by.map((at) => at[i])]);
    parts.push(...heat("attention, layer by layer", some, Math.max(...some.slice(0, -1).flatMap((x) => x[2]), 0.05)));
  }
  for (const [key, name] of [["gradient", "gradient of its rows, layer by layer"], ["keys", "norm of its keys, layer by layer"], ["values", "norm of its values, layer by layer"]]) {
    if (block[key]) parts.push(...heat(name, [["", block.agent, block[key]]], Math.max(...block[key])));
  }
  box.replaceChildren(...parts);
}

let kept = null;
function preview(u) {
  nodes.forEach((node, i) => node.classList.toggle("on", i === u));
  const lane = u === null ? null : look.blocks[units[u].block].agent;
  looked = u;
  markArcs();
  $("lanes").classList.toggle("looking", lane !== null);
  if (look.rows) {
    const by = u === null ? [] : look.rows[u].slice();
    if (by.length) by[by.findIndex((x) => x > 0)] = 0;  // the first token
    const most = Math.max(...by, 1e-9);
    tokenNodes.forEach((node, r) => {
      node.style.setProperty("--mass", u === null ? 0 : Math.sqrt(by[r] / most).toFixed(3));
      node.style.setProperty("--reader", u === null ? "transparent" : `light-dark(oklch(70% .13 ${HUES[lane % HUES.length]}), oklch(58% .12 ${HUES[lane % HUES.length]}))`);
    });
  }
  drawDetail(u);
}
function keep(u) {
  kept = kept === u ? null : u;
  nodes.forEach((node, i) => { node.classList.toggle("kept", i === kept); node.setAttribute("aria-pressed", i === kept); });
  preview(u);
}

// ---- controls -------------------------------------------------------------------------------------------------------

const layerName = () => layer < 0 ? "all layers" : `layer ${layer}`;
function drawLayer() {
  $("layer-name").textContent = layerName();
  $("layer").setAttribute("aria-valuetext", layerName());
  drawBars(); drawArcs(); drawMatrix(); preview(kept);
}
function drawShade() {
  const key = $("shade").value, all = units.filter((u) => u.step !== null).map((u) => look.blocks[u.block].steps[u.step][key]).filter((x) => x !== null);
  const low = key === "p" ? 0 : Math.min(...all), high = key === "p" ? 1 : Math.max(...all);
  units.forEach(({ block, step }, u) => {
    if (step === null) return;
    const x = look.blocks[block].steps[step][key];
    nodes[u].style.setProperty("--shade", x === null ? 0 : high > low ? (x - low) / (high - low) : 0.5);
  });
  $("scale").textContent = all.length ? (key === "p" ? "0 to 100 %" : `${number(low)} to ${number(high)}`) : "";
}
function drawFound() {
  const wanted = $("find").value.toLowerCase();
  let count = 0;
  const has = (text) => Boolean(wanted) && text !== null && text.toLowerCase().includes(wanted);
  look.blocks.forEach((block, b) => {
    for (let i = 0; i < block.rows; i++) {
      const step = block.steps[i], match = step ? has(step.text) || step.nearest.some(([t]) => has(t)) : has(block.texts[i]);
      tokenNodes[rowsBefore[b] + i].classList.toggle("match", match);
      count += match;
    }
  });
  document.body.classList.toggle("finding", Boolean(wanted));
  $("found").textContent = wanted ? `${count} found` : "";
}

const kinds = Object.keys(KINDS).filter((kind) => document.querySelector(`[data-kind="${kind}"]`));
kinds.forEach((kind) => {
  const box = el("input", { type: "checkbox", checked: true });
  box.onchange = () => {
    document.querySelectorAll(`[data-kind="${kind}"]`).forEach((node) => { node.hidden = !box.checked; });
    drawArcs();
  };
  $("kinds").append(el("label", {}, box, ` ${KINDS[kind]}`));
});
const steps = look.blocks.flatMap((block) => block.steps);
for (const [key, name] of SHADES) if (steps.some((s) => s[key] !== null && (key !== "p" || s.text !== null))) $("shade").append(el("option", { value: key, textContent: name }));
if (!$("shade").options.length) $("shade").parentElement.hidden = true;
else drawShade();
$("shade").onchange = drawShade;
$("find").oninput = drawFound;
$("layers").hidden = !look.attention || look.layers < 2;
$("layer").max = look.layers - 1;
$("layer").oninput = () => { layer = Number($("layer").value); drawLayer(); };

$("lanes").onkeydown = (event) => {
  const u = nodes.indexOf(document.activeElement);
  if (u < 0) return;
  const seen = nodes.map((n, i) => i).filter((i) => nodes[i].offsetParent), at = seen.indexOf(u);
  const lane = (i) => look.blocks[units[i].block].agent;
  const next = { ArrowRight: () => seen[at + 1], ArrowLeft: () => seen[at - 1], Home: () => seen[0], End: () => seen.at(-1),
    ArrowDown: () => seen.find((i) => lane(i) > lane(u)), ArrowUp: () => seen.find((i) => lane(i) === lane(seen.filter((j) => lane(j) < lane(u)).at(-1) ?? -1)),
    Escape: () => { if (kept !== null) keep(kept); preview(null); return u; } }[event.key];
  if (!next) return;
  event.preventDefault();
  const to = next();
  if (to !== undefined && to !== u) nodes[to].focus();
};

$("of-attention").hidden = !look.attention;
drawGradients();
drawLayer();
new ResizeObserver(drawArcs).observe($("lanes"));
