"""The first half of the page's script: numbers, scales and curves, drawn as SVG without a library.

Texts of a run reach the document as text nodes only, so none of them can be markup.
"""

CURVES = r"""
"use strict";
const { runs, plots, figures } = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const FEW = 50; // points that each count on their own: no smoothing
let smoothing = 0.6;

// ---------------------------------------------------------------- elements and numbers
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const place = (id, ...nodes) => document.getElementById(id).append(...nodes);
const color = index => `--color: var(--run${index % 8})`;
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

const tiny = value => value.toExponential(2).replace(/\.?0+e/, "e");

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) return compact.format(value);
  if (size > 0 && size < 1e-3) return tiny(value);
  return String(Number(value.toPrecision(4)));
}

function figure(name, value) {
  if (value === null) return "–";
  if (name === "mfu") return `${(100 * value).toFixed(1)} %`;
  if (name !== "seconds") return number(value);
  if (value < 100) return `${value.toFixed(1)} s`;
  return value < 6000 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
}

// ---------------------------------------------------------------- scales
function linearTicks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find(factor => factor * unit >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const size = Math.max(Math.abs(low), Math.abs(high)), isPlain = size < 1e4 && decimals < 4;
  const label = value => isPlain ? value.toFixed(decimals) : size < 0.01 ? tiny(value) : number(value);
  return ticks.map(value => ({ value, label: value ? label(value) : "0" }));
}

function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / count));
  const factors = last - first > count / 2 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = first; power <= last; power += every)
    for (const factor of factors) ticks.push(factor * 10 ** power);
  const inside = ticks.filter(value => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 1 ? inside.map(value => ({ value, label: number(value) })) : linearTicks(low, high, count);
}

function valueScale(values, isLog, top, bottom) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null || (isLog && value <= 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) [low, high] = isLog ? [0.1, 1] : [0, 1];
  if (isLog) {
    if (high / low < 1.02) [low, high] = [low / 1.2, high * 1.2];
  } else {
    // Near zero a curve is read against zero; far from it, against its own range.
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    [low, high] = [low >= 0 && low < 0.35 * high || low === 0 ? 0 : low - pad, high + pad];
  }
  const bend = isLog ? Math.log10 : value => value;
  const span = bend(high) - bend(low);
  const at = value => bottom - (bend(value) - bend(low)) / span * (bottom - top);
  const count = Math.max(2, Math.round((bottom - top) / 45));
  return { at, ticks: isLog ? logTicks(low, high, count) : linearTicks(low, high, count) };
}

// ---------------------------------------------------------------- curves
function smooth(values, weight) {
  let mean = 0, total = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function path(line, values, x, y) {
  let text = "", isDown = false;
  values.forEach((value, k) => {
    const isKnown = value !== null && Number.isFinite(y(value));
    if (isKnown) text += `${isDown ? "L" : "M"}${x(line.x[k]).toFixed(1)} ${y(value).toFixed(1)}`;
    isDown = isKnown;
  });
  return text;
}

function band(line, x, y) {
  const known = line.x.map((_, k) => k).filter(k => line.low[k] !== null && Number.isFinite(y(line.low[k])));
  const point = (values, k) => `${x(line.x[k]).toFixed(1)} ${y(values[k]).toFixed(1)}`;
  const there = known.map(k => point(line.high, k)), back = known.reverse().map(k => point(line.low, k));
  return known.length ? `M${there.concat(back).join("L")}Z` : "";
}

const charts = [];
let clips = 0;

class Chart {
  constructor(plot) {
    this.plot = plot;
    this.isLog = false;
    this.svg = svg("svg", { class: "plot", role: "img", "aria-label": plot.title });
    this.tip = html("div", { class: "tip" });
    this.clip = `clip${clips++}`;
    const names = Object.entries(plot.lines).filter(([name, text]) => text && runs.some(run => run.series[name]));
    const keys = names.map(([name, text]) => html("span", { class: "key" },
      svg("svg", { width: 22, height: 8, style: "width: 22px; --color: var(--soft)" }, svg("path", {
        class: name === Object.keys(plot.lines)[0] ? "line" : "line second", d: "M1 4H21" })), text));
    const toggle = html("button", { type: "button", "aria-pressed": "false", title: "logarithmic axis" }, "log");
    toggle.addEventListener("click", () => {
      this.isLog = !this.isLog;
      toggle.setAttribute("aria-pressed", this.isLog);
      this.draw();
    });
    this.node = html("figure", { "data-plot": plot.title },
      html("figcaption", {}, html("h2", {}, plot.title), html("span", { class: "unit" }, plot.unit),
        html("span", { class: "end" }, ...(names.length > 1 ? keys : []), toggle)),
      this.svg, this.tip);
    this.svg.addEventListener("pointermove", event => this.point(event));
    this.svg.addEventListener("pointerleave", () => charts.forEach(chart => chart.leave()));
  }

  lines() {
    const found = [];
    Object.entries(this.plot.lines).forEach(([name, text], order) => runs.forEach((run, index) => {
      const line = run.series[name];
      if (line && !hidden.has(index)) found.push({ ...line, name, text, order, index, run });
    }));
    return found;
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight, top = 8, bottom = height - 22;
    if (!width) return;
    this.drawn = this.lines().map(line => {
      const isSmooth = smoothing && line.x.length > FEW && !this.plot.is_exact;
      return { ...line, smoothed: isSmooth ? smooth(line.y, smoothing) : line.y };
    });
    const value = valueScale(this.drawn.flatMap(line => line.y), this.isLog, top, bottom);
    const left = Math.max(...value.ticks.map(tick => tick.label.length), 2) * 6.6 + 8, right = width - 10;
    const steps = this.drawn.flatMap(line => [line.x[0], line.x[line.x.length - 1]]);
    let [first, last] = [Math.min(...steps), Math.max(...steps)];
    if (!steps.length || first === last) [first, last] = [(steps[0] ?? 1) - 1, (steps[0] ?? 1) + 1];
    this.x = step => left + (step - first) / (last - first) * (right - left);
    this.step = pixel => first + (pixel - left) / (right - left) * (last - first);
    this.y = value.at;
    this.rule = svg("line", { class: "rule", y1: top, y2: bottom });
    const marks = linearTicks(first, last, Math.max(2, Math.round((right - left) / 90)))
      .filter(tick => Number.isInteger(Number(tick.value.toFixed(6))));
    this.svg.replaceChildren(
      svg("clipPath", { id: this.clip },
        svg("rect", { x: left - 1, y: 0, width: right - left + 6, height: bottom + 4 })),
      ...value.ticks.flatMap(tick => [
        svg("line", { class: "grid", x1: left, x2: right, y1: value.at(tick.value), y2: value.at(tick.value) }),
        svg("text", { x: left - 7, y: value.at(tick.value) + 4, "text-anchor": "end" }, tick.label)]),
      ...marks.map(tick => svg("text", { x: this.x(tick.value), y: height - 5, "text-anchor":
        this.x(tick.value) > right - 14 ? "end" : "middle" }, number(Math.round(tick.value)))),
      svg("g", { "clip-path": `url(#${this.clip})` }, ...this.drawn.flatMap(line => this.curve(line))),
      this.rule);
  }

  curve(line) {
    const style = color(line.index), kind = line.order ? "line second" : "line", nodes = [];
    if (line.low) nodes.push(svg("path", { class: "range", style, d: band(line, this.x, this.y) }));
    if (line.smoothed !== line.y)
      nodes.push(svg("path", { class: "line faint", style, d: path(line, line.y, this.x, this.y) }));
    nodes.push(svg("path", { class: kind, style, "data-points": line.x.length, "data-name": line.name,
      d: path(line, line.smoothed, this.x, this.y) }));
    if (line.x.length > FEW / 2) return nodes;
    const known = line.x.map((_, k) => k).filter(k => line.y[k] !== null && Number.isFinite(this.y(line.y[k])));
    return nodes.concat(known.map(k =>
      svg("circle", { class: "dot", style, r: 3, cx: this.x(line.x[k]), cy: this.y(line.y[k]) })));
  }

  point(event) {
    const step = this.step(within(this.svg, event)[0]);
    const rows = this.drawn.map(line => {
      const k = line.x.reduce((best, x, at) => Math.abs(x - step) < Math.abs(line.x[best] - step) ? at : best, 0);
      return { line, k };
    });
    if (!rows.length) return;
    const nearest = rows[0].line.x[rows[0].k];
    charts.forEach(chart => chart.mark(nearest));
    const label = line => [runs.length > 1 ? line.run.name : "", line.text].filter(Boolean).join(", ");
    const values = rows.map(({ line, k }) => html("div", { style: color(line.index) },
      html("span", { class: "swatch" }), html("span", {}, label(line) || this.plot.title),
      html("span", { class: "value" }, number(line.smoothed[k]))));
    this.tip.replaceChildren(html("b", {}, `step ${nearest.toLocaleString("en")}`), ...values);
    showTip(this.tip, this.svg, this.x(nearest), 8);
  }

  mark(step) {
    if (!this.rule) return;
    this.rule.setAttribute("x1", this.x(step));
    this.rule.setAttribute("x2", this.x(step));
    this.rule.style.visibility = "visible";
  }

  leave() {
    this.tip.style.visibility = "hidden";
    if (this.rule) this.rule.style.visibility = "hidden";
  }
}

function within(drawing, event) {
  const box = drawing.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function showTip(tip, drawing, x, y) {
  const frame = tip.parentNode, inner = drawing.getBoundingClientRect(), outer = frame.getBoundingClientRect();
  const at = inner.left - outer.left + x, isRight = at + 14 + tip.offsetWidth < frame.clientWidth;
  tip.style.left = `${Math.max(4, isRight ? at + 14 : at - 14 - tip.offsetWidth)}px`;
  tip.style.top = `${inner.top - outer.top + y}px`;
  tip.style.visibility = "visible";
}
"""
