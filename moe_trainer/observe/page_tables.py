"""The second half of the page's script: expert load by layer, figures, configs, environments, and what starts it."""

TABLES = r"""
// ---------------------------------------------------------------- expert load
class LoadTable {
  constructor(index) {
    this.svg = svg("svg", { role: "img", "aria-label": "expert load by layer and expert" });
    this.tip = html("div", { class: "tip" });
    this.output = html("output");
    this.slider = html("input", { type: "range", min: 0, step: 1, "aria-label": "step" });
    this.slider.addEventListener("input", () => this.paint());
    const chooser = html("select", { "aria-label": "run" }, ...runs.flatMap((run, k) =>
      run.load ? [html("option", { value: k }, run.name)] : []));
    chooser.addEventListener("change", () => this.choose(Number(chooser.value)));
    this.node = html("figure", { "data-plot": "Expert load by layer" },
      html("figcaption", {}, html("h2", {}, "Expert load by layer"),
        html("span", { class: "unit" }, "tokens of each expert over its layer's mean"),
        html("span", { class: "end" }, chooser.length > 1 ? chooser : null,
          html("span", { class: "key" }, "¼", html("span", { class: "scale" }), "4 ×"),
          html("span", { class: "key", style: "--color: var(--dead)" },
            html("span", { class: "swatch" }), "no token"))),
      html("div", { class: "slider" }, this.slider, this.output), this.svg, this.tip);
    this.svg.addEventListener("pointermove", event => this.point(event));
    this.svg.addEventListener("pointerleave", () => { this.tip.style.visibility = "hidden"; });
    this.choose(index);
  }

  choose(index) {
    this.load = runs[index].load;
    this.slider.max = this.load.steps.length - 1;
    this.slider.value = this.slider.max;
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width) return;
    const { layers, tables } = this.load, experts = tables[0][0].length, left = 46, right = width - 44, top = 16;
    const cell = (right - left) / experts, row = Math.max(9, Math.min(24, 520 / layers.length));
    const bottom = top + row * layers.length, gap = Math.min(cell, row) > 7 ? 1.5 : 0.25;
    const everyRow = Math.ceil(13 / row), everyColumn = Math.ceil(24 / cell);
    this.at = (x, y) => [Math.floor((x - left) / cell), Math.floor((y - top) / row)];
    this.cells = layers.map((_, l) => tables[0][l].map((_, e) => svg("rect", { class: "cell", "stroke-width": gap,
      x: left + e * cell, y: top + l * row, width: cell, height: row })));
    this.ends = layers.map((_, l) => svg("text", { x: right + 8, y: top + l * row + row / 2 + 4 }));
    this.svg.style.height = `${bottom + 34}px`;
    this.svg.replaceChildren(...this.cells.flat(), ...this.ends.filter((_, l) => l % everyRow === 0),
      svg("text", { x: left - 8, y: 9, "text-anchor": "end" }, "layer"), svg("text", { x: right + 8, y: 9 }, "max"),
      ...layers.flatMap((layer, l) => l % everyRow ? [] : [
        svg("text", { x: left - 8, y: top + l * row + row / 2 + 4, "text-anchor": "end" }, layer)]),
      ...tables[0][0].flatMap((_, e) => e % everyColumn ? [] : [
        svg("text", { x: left + (e + 0.5) * cell, y: bottom + 15, "text-anchor": "middle" }, e)]),
      svg("text", { x: (left + right) / 2, y: bottom + 30, "text-anchor": "middle" }, "expert"));
    this.paint();
  }

  paint() {
    const at = Number(this.slider.value), table = this.load.tables[at];
    this.output.textContent = `step ${this.load.steps[at].toLocaleString("en")}`;
    this.cells?.forEach((cells, l) => {
      cells.forEach((cell, e) => { cell.style.fill = loadColor(table[l][e]); });
      this.ends[l].textContent = (Math.max(...table[l]) / 100).toFixed(2);
    });
  }

  point(event) {
    const [x, y] = within(this.svg, event), [e, l] = this.at(x, y);
    const percent = this.load.tables[Number(this.slider.value)][l]?.[e];
    this.tip.style.visibility = "hidden";
    if (percent === undefined) return;
    const text = percent ? `${(percent / 100).toFixed(2)} × the mean` : "no token";
    this.tip.replaceChildren(html("b", {}, `layer ${this.load.layers[l]}, expert ${e}`), html("div", {}, text));
    showTip(this.tip, this.svg, x, y + 14);
  }
}

function loadColor(percent) {
  if (!percent) return "var(--dead)";
  const share = Math.max(-1, Math.min(1, Math.log2(percent / 100) / 2));
  const side = share < 0 ? "--cold" : "--hot";
  return `color-mix(in oklab, var(${side}) ${(100 * Math.abs(share)).toFixed(0)}%, var(--even))`;
}

// ---------------------------------------------------------------- texts
function summaries() {
  const known = Object.entries(figures).filter(([name]) => runs.some(run => run.summary[name] !== null));
  if (runs.length === 1) return html("section", {}, html("dl", {}, ...known.map(([name, text]) =>
    html("div", {}, html("dt", {}, text), html("dd", {}, figure(name, runs[0].summary[name]))))));
  const row = (run, index) => {
    const box = html("input", { type: "checkbox", checked: "", "aria-label": `show ${run.name}` });
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(index) : hidden.add(index);
      charts.forEach(chart => chart.draw());
    });
    const label = html("label", { style: color(index), title: run.name }, box,
      html("span", { class: "swatch" }), html("span", {}, run.name));
    const cells = known.map(([name]) => html("td", {}, figure(name, run.summary[name])));
    return html("tr", {}, html("th", {}, label), ...cells);
  };
  const head = html("tr", {}, html("th"), ...known.map(([_, text]) => html("th", {}, text)));
  return html("section", {}, html("div", { class: "scroll" },
    html("table", {}, html("thead", {}, head), html("tbody", {}, ...runs.map(row)))));
}

function text(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && value >= 1e5) return value.toLocaleString("en");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

const differ = (columns, name) => new Set(columns.map(column => JSON.stringify(column[name]))).size > 1;

function table(columns, heads, isCompared) {
  const names = [...new Set(columns.flatMap(Object.keys))];
  const body = names.map(name => html("tr", isCompared && differ(columns, name) ? { class: "differs" } : {},
    html("th", {}, name), ...columns.map(column => html("td", {}, text(column[name])))));
  const head = heads && html("thead", {}, html("tr", {}, html("th"), ...heads.map(name => html("th", {}, name))));
  return html("div", { class: "scroll" }, html("table", {}, head, html("tbody", {}, ...body)));
}

function tables() {
  const heads = runs.length > 1 ? runs.map(run => run.name) : null;
  const configs = runs.map(run => run.config), names = [...new Set(configs.flatMap(Object.keys))];
  const differing = names.filter(name => differ(configs, name));
  const pick = config => Object.fromEntries(differing.map(name => [name, config[name]]));
  const starts = runs.flatMap(run => run.environment.map(start => ({ run, start })));
  return [
    heads && differing.length ? html("section", {}, html("h2", {}, "Where the configs differ"),
      table(configs.map(pick), heads)) : null,
    starts.length ? html("section", {}, html("h2", {}, "Environment"), table(starts.map(({ start }) => start),
      starts.length > 1 ? starts.map(({ run, start }) =>
        `${runs.length > 1 ? `${run.name}, ` : ""}from step ${start.from_step}`) : null)) : null,
    names.length ? html("section", {},
      html("details", {}, html("summary", {}, "Config"), table(configs, heads, true))) : null,
  ].filter(Boolean);
}

// ---------------------------------------------------------------- the page
document.body.classList.toggle("many", runs.length > 1);
place("runs", summaries());
charts.push(...plots.map(plot => new Chart(plot)));
place("plots", ...charts.map(chart => chart.node));
const firstLoad = runs.findIndex(run => run.load);
const loadTable = firstLoad < 0 ? null : new LoadTable(firstLoad);
if (loadTable) place("load", loadTable.node);
place("tables", ...tables());

function drawAll() {
  charts.forEach(chart => chart.draw());
  loadTable?.draw();
}
const slider = document.getElementById("smoothing");
slider.value = smoothing;
slider.addEventListener("input", () => {
  smoothing = Number(slider.value);
  charts.forEach(chart => chart.draw());
});
document.getElementById("theme").addEventListener("click", () => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches, now = document.documentElement.style.colorScheme;
  document.documentElement.style.colorScheme = (now || (isDark ? "dark" : "light")) === "dark" ? "light" : "dark";
});
let width = 0;
new ResizeObserver(() => {
  if (width !== document.body.clientWidth) drawAll();
  width = document.body.clientWidth;
}).observe(document.body);
drawAll();
"""
