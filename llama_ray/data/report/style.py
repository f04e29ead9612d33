"""The looks of the report, in light and dark, on paper, from phones to wide screens."""

from llama_ray.data.report.html import Html

STYLE = Html("""
:root { color-scheme: light dark; --ground: #fcfcfb; --panel: #f3f3f0; --ink: #1b1c1d; --soft: #5c6065;
  --line: #dcdcd6; --first: #2a6fbb; --second: #d9852b; --track: #e7e7e2; }
@media (prefers-color-scheme: dark) { :root { --ground: #17191b; --panel: #202326; --ink: #e8e8e5; --soft: #a2a7ad;
  --line: #373b40; --first: #63a4ea; --second: #e6a052; --track: #2c3034; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; } .soft, .legend, figcaption, dt { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap; }
th, td { padding: .375rem .75rem .375rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.words { overflow-wrap: anywhere; min-width: 5rem; }
.bars { margin: .75rem 0; font-size: .875rem; }
.bar { display: grid; grid-template-columns: minmax(6rem, 24rem) 1fr 10rem; gap: .75rem; align-items: center; }
.bar { padding: .15rem 0; }
.name { overflow-wrap: anywhere; } .value { font-variant-numeric: tabular-nums; color: var(--soft); }
.track { background: var(--track); border-radius: 3px; height: .75rem; display: block; overflow: hidden; }
.fill { background: var(--first); height: 100%; display: block; border-radius: 3px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; max-width: 30rem; } figcaption { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font: 10.5px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg line { stroke: var(--line); } .first { fill: var(--first); } .second { fill: var(--second); }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin: 0 .35rem 0 0; }
.key.first { background: var(--first); } .key.second { background: var(--second); }
.legend span { display: inline-block; margin-right: 1rem; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; font-size: .875rem; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary b { font-weight: 600; }
summary .name::before { content: "\\25B8\\00A0"; color: var(--soft); }
details[open] > summary .name::before { content: "\\25BE\\00A0"; }
.bars details { border: 0; padding: 0; }
.example { margin: .5rem 0 .75rem; }
pre { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; margin: .35rem 0; font-size: .8125rem;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 18rem; overflow-y: auto; }
code { font-size: .8125rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem; margin: .5rem 0; }
dd { margin: 0; overflow-wrap: anywhere; font-size: .875rem; }
@media (max-width: 40rem) { main { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.4rem; }
  .bar { grid-template-columns: 1fr auto; gap: .1rem .75rem; padding: .3rem 0; }
  td.words:nth-child(n + 2) { min-width: 10rem; } .track { grid-column: 1 / 3; grid-row: 2; } }
@media print { details:not([open]) { display: none; } pre { max-height: none; } }
""")
