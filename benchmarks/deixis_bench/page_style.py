"""The style sheet of a report's page: one column, two sets of colours, and a print form.

The variables are those that `page_plots.PAINTS` puts into plots.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1d1f; --muted: #63666b; --grid: #e3e3e0; --graph: #2a6fb5;
  --python: #c4581a; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #ecebe8; --muted: #a2a5aa; --grid: #34363a;
  --graph: #6aaaf0; --python: #f2935c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 44rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.muted, figcaption, caption { color: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .5rem 1.5rem; margin: 1.25rem 0; }
.figures div { border-top: 1px solid var(--grid); padding-top: .4rem; }
.figures dt { color: var(--muted); font-size: .875rem; }
.figures dd { margin: 0; font-size: 1.5rem; line-height: 1.25; }
figure { margin: 1rem 0; max-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
figcaption, caption { font-size: .875rem; text-align: left; }
.wide { overflow-x: auto; margin: .75rem 0 1rem; }
.wide:focus-visible { outline: 2px solid var(--graph); outline-offset: 2px; }
.pairs { display: flex; flex-wrap: wrap; gap: 0 3rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2.5rem); }
tbody th { position: sticky; left: 0; background: var(--paper); }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.text { text-align: left; white-space: normal; }
summary { cursor: pointer; }
@media print { details > * { display: block; } }
"""
