"""The page of `moe-report`: which plots there are, its frame and its looks. `page_curves` and `page_tables` draw it.

One file that asks nobody for anything: its own content security policy allows no connection, and no script but ours.
"""

import base64
import hashlib
import html
import json
from typing import Any

from moe_trainer.observe.page_curves import CURVES
from moe_trainer.observe.page_tables import TABLES

MARK = "moe-report"
"""Stands near the beginning of every page."""
_SCRIPT = CURVES + TABLES

_PLOTS: list[dict[str, Any]] = [
    {"title": "Loss", "unit": "nats per token", "lines": {"loss": "training", "val_loss": "validation"}},
    {"title": "Perplexity", "unit": "validation", "lines": {"val_perplexity": ""}},
    {"title": "Gradient norm", "unit": "before clipping", "lines": {"grad_norm": ""}},
    {"title": "Learning rate", "unit": "", "lines": {"lr": ""}, "is_exact": True},
    {"title": "Throughput", "unit": "tokens per second and GPU", "lines": {"tokens_per_second_per_gpu": ""}},
    {"title": "Model FLOPs", "unit": "TFLOP/s per GPU", "lines": {"tflops_per_gpu": ""}},
    {"title": "MFU", "unit": "share of the peak", "lines": {"mfu": ""}},
    {"title": "Step time", "unit": "seconds", "lines": {"seconds": "step", "data_seconds": "data"}},
    {"title": "Memory", "unit": "GiB, peak of the first rank", "lines": {"memory_gib": ""}, "is_exact": True},
    {"title": "Expert load", "unit": "busiest over mean", "lines": {"expert_load_max_over_mean": ""}},
    {"title": "Entropy", "unit": "1 is even", "lines": {"router_entropy": "router", "expert_load_entropy": "load"}},
    {"title": "Dead experts", "unit": "without a token, all layers", "lines": {"dead_experts": ""}},
    {
        "title": "Skipped steps",
        "unit": "so far",
        "lines": {"skipped_steps": "skipped", "grad_spikes": "spikes"},
        "is_exact": True,
    },
    {"title": "Balancing loss", "unit": "before its coefficient", "lines": {"aux_loss": ""}},
    {"title": "Router z-loss", "unit": "before its coefficient", "lines": {"z_loss": ""}},
]
_NOT_DRAWN = {"tokens", "tokens_per_second"}

_FIGURES = {
    "step": "steps",
    "tokens": "tokens",
    "loss": "loss",
    "val_loss": "validation loss",
    "best_val_loss": "best of it",
    "tokens_per_second_per_gpu": "tokens/s/GPU",
    "mfu": "MFU",
    "memory_gib": "GiB",
    "expert_load_max_over_mean": "load, max/mean",
    "dead_experts": "dead experts",
    "skipped_steps": "skipped steps",
    "seconds": "training time",
}


def page(runs: list[dict[str, Any]]) -> str:
    """The whole document for what `observe.report.load_run` gives; a text of a run is data in it, never markup."""
    data = {"runs": runs, "plots": _plots(runs), "figures": _FIGURES}
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(_SCRIPT)}'"
    title = html.escape(" · ".join(run["name"] for run in runs))
    return f"""<!doctype html>
<html lang="en" data-kind="{MARK}">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
<header>
  <h1>{title}</h1>
  <div class="controls">
    <label>smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01"></label>
    <button id="theme" type="button">dark / light</button>
  </div>
</header>
<main>
  <noscript>The curves are drawn by a script in this file.</noscript>
  <div id="runs"></div>
  <div id="plots"></div>
  <div id="load"></div>
  <div id="tables"></div>
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{_SCRIPT}</script>
</html>
"""


def _plots(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that some run has data for; a metric without a plot of its own gets one under its name."""
    known = {name for plot in _PLOTS for name in plot["lines"]} | _NOT_DRAWN
    present = {name: None for run in runs for name in run["series"]}  # in order
    others = [{"title": name, "unit": "", "lines": {name: ""}} for name in present if name not in known]
    return [plot for plot in [*_PLOTS, *others] if any(name in present for name in plot["lines"])]


def _json(data: Any) -> str:
    """JSON that no parser of HTML sees an end of script, a comment or an entity in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_STYLE = """
:root {
  color-scheme: light dark;
  --page: light-dark(#f7f6f3, #131519); --card: light-dark(#ffffff, #1b1e24);
  --ink: light-dark(#1e2127, #e7e5e0); --soft: light-dark(#646972, #9aa1ab); --rule: light-dark(#e5e2db, #2f343d);
  --even: light-dark(#efece5, #2b2f37); --cold: light-dark(#1f62b8, #4aa3ff); --hot: light-dark(#d3480b, #ff8a3c);
  --dead: light-dark(#17191d, #f4f2ee); --mark: light-dark(#fdf3d7, #3a3320);
  --run0: light-dark(#2563c9, #6ea8fe); --run1: light-dark(#d35f0a, #ff9f4a); --run2: light-dark(#1d8549, #5ecb8a);
  --run3: light-dark(#7d42bd, #b892f0); --run4: light-dark(#c42f48, #ff7b8a); --run5: light-dark(#0a7a8c, #4cc6d8);
  --run6: light-dark(#86572a, #d0a070); --run7: light-dark(#bd358b, #f58cc8);
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
header, main { max-width: 1320px; margin: 0 auto; padding: 0 clamp(12px, 2.5vw, 28px); }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 24px; padding-top: 22px; }
h1 { font-size: 22px; font-weight: 650; letter-spacing: -.01em; margin: 0; flex: 1 1 320px; overflow-wrap: anywhere; }
h2 { font-size: 15px; font-weight: 620; margin: 0; }
.controls { display: flex; align-items: center; gap: 16px; color: var(--soft); font-size: 13px; }
.controls label { display: flex; align-items: center; gap: 8px; }
input[type=range], input[type=checkbox] { accent-color: var(--run0); margin: 0; }
button, select {
  font: inherit; font-size: 12px; color: var(--soft); background: none; border: 1px solid var(--rule);
  border-radius: 6px; padding: 1px 8px; cursor: pointer;
}
select { max-width: 100%; }
option { color: var(--ink); background: var(--card); }
button[aria-pressed=true] { color: var(--card); background: var(--soft); border-color: var(--soft); }
section, figure {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0; padding: 14px 16px;
  position: relative; min-width: 0;
}
#runs { display: grid; gap: 10px; margin: 16px 0; }
#runs label { display: flex; align-items: center; gap: 8px; cursor: pointer; color: var(--ink); font-weight: 600; }
#runs .scroll { margin: 0; }
#runs table { font-size: 14px; }
#runs td { min-width: 0; white-space: nowrap; }
#runs tr > :first-child { position: sticky; left: 0; background: var(--card); }
#runs label span:last-child { max-width: min(38vw, 30ch); overflow: hidden; text-overflow: ellipsis; }
#runs thead th { color: var(--soft); font-size: 12px; font-weight: 500; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px 16px; margin: 0; }
dt { font-size: 12px; color: var(--soft); white-space: nowrap; }
dd { margin: 0; font-size: 18px; font-weight: 550; letter-spacing: -.01em; }
#plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px; }
#plots figure:first-child { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 10px; margin-bottom: 6px; }
figcaption .unit { color: var(--soft); font-size: 12px; }
figcaption .end { margin-left: auto; display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; }
.key { color: var(--soft); font-size: 12px; display: inline-flex; align-items: center; gap: 5px; }
.key { white-space: nowrap; }
svg { display: block; width: 100%; overflow: visible; }
.plot { height: 210px; touch-action: pan-y; }
#plots figure:first-child .plot { height: 330px; }
text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); stroke-width: 1; shape-rendering: crispEdges; }
.line { fill: none; stroke: var(--color); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: .28; }
.line.second { stroke-dasharray: 5 4; }
.many .line.faint { opacity: .13; }
.many .range { display: none; }
.dot { fill: var(--card); stroke: var(--color); stroke-width: 1.6; }
.range { fill: var(--color); opacity: .13; }
.rule { stroke: var(--soft); stroke-dasharray: 2 3; visibility: hidden; }
.tip {
  position: absolute; z-index: 2; pointer-events: none; visibility: hidden; max-width: calc(100% - 16px);
  background: var(--card); border: 1px solid var(--rule); border-radius: 7px; padding: 6px 9px; font-size: 12px;
  line-height: 1.45; box-shadow: 0 4px 14px rgb(0 0 0 / .14);
}
.tip b { font-weight: 600; }
.tip div { display: flex; align-items: center; gap: 6px; white-space: nowrap; }
.swatch { width: 9px; height: 9px; border-radius: 2px; background: var(--color); flex: none; }
.tip .swatch + span { overflow: hidden; text-overflow: ellipsis; }
.tip .value { margin-left: auto; padding-left: 10px; font-weight: 550; }
#load figure { margin-top: 12px; }
.slider { display: flex; align-items: center; gap: 12px; margin: 2px 0 10px; }
.slider input { flex: 1; min-width: 60px; }
.slider output { font-size: 13px; color: var(--soft); white-space: nowrap; min-width: 11ch; text-align: right; }
.scale { width: 132px; height: 9px; border-radius: 3px; background: linear-gradient(in oklab 90deg,
  var(--cold), var(--even), var(--hot)); }
.cell { stroke: var(--card); }
#tables { display: grid; gap: 12px; margin: 12px 0 40px; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 3px 16px 3px 0; border-top: 1px solid var(--rule); }
th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; }
thead th { color: var(--ink); border-top: none; font-weight: 600; }
td { overflow-wrap: anywhere; min-width: 120px; }
tr.differs td, tr.differs th { background: var(--mark); color: var(--ink); }
summary { cursor: pointer; font-weight: 620; font-size: 15px; }
@media (max-width: 560px) {
  dl { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }
  section, figure { padding: 12px; }
  #plots figure:first-child .plot { height: 240px; }
}
"""
