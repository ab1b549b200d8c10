"""The style of the HTML page: one accent, light and dark, a phone's width, a desk's, and paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #22272b; --soft: #5c656c; --rule: #dde1e4; --ground: #ffffff;
  --band: #f5f7f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e6; --soft: #9aa4ab; --rule: #363d42; --ground: #15191c; --band: #1d2327; --accent: #56b4e9; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--accent); }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.soft, figcaption, .origin { color: var(--soft); font-size: .85rem; }
.headlines { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0 0; padding: 0; }
.headlines > div { background: var(--band); border-radius: .4rem; padding: .7rem .9rem .8rem; min-width: 0; }
.headlines dt { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.headlines dd { margin: .15rem 0 0; overflow-wrap: anywhere; }
.value { font-size: 1.7rem; line-height: 1.2; font-weight: 600; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.unit { font-size: .85rem; color: var(--soft); }
.of { display: block; font-size: .85rem; line-height: 1.35; }
nav { margin: 1.25rem 0 0; font-size: .9rem; }
nav a { display: inline-block; margin: 0 1rem .25rem 0; }
a { color: var(--accent); }
h3 { font-size: 1rem; margin: 1.6rem 0 .35rem; }
.scroll { overflow-x: auto; max-width: 100%; -webkit-overflow-scrolling: touch; border: 1px solid var(--rule);
  border-radius: .4rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums lining-nums; width: 100%; }
th, td { padding: .38rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
td, th { white-space: nowrap; }
td.wide { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
td.path { white-space: normal; min-width: 7rem; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--band); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--ground); white-space: normal;
  min-width: 9rem; max-width: 20rem; overflow-wrap: break-word; }
.figure { text-align: right; }
.edges { display: block; color: var(--soft); font-size: .8rem; }
.origin { margin: .35rem 0 0; max-width: none; }
code { font: .92em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0 0; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; }
figure.photo img { background: #fff; }
figcaption { max-width: 44rem; margin-top: .25rem; }
details { margin: .75rem 0 0; }
details .scroll { margin-top: .5rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { overflow-x: auto; font: .75rem/1.35 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: .5rem 0 0;
  padding: .7rem; background: var(--band); border-radius: .4rem; }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  tbody th { max-width: 9.5rem; overflow-wrap: anywhere; min-width: 6.5rem; }
  th, td { padding: .38rem .55rem; } }
@media print {
  :root { --ink: #000; --soft: #444; --rule: #bbb; --ground: #fff; --band: #f2f2f2; --accent: #00598c; }
  @page { size: A4; margin: 14mm 12mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav, details { display: none; }
  h2, h3 { break-after: avoid; }
  figure, .headlines > div { break-inside: avoid; }
  tr { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7pt; }
  .edges { font-size: 6.5pt; }
  th, td { padding: 2px 4px; white-space: normal; overflow-wrap: break-word; min-width: 0; }
  thead th { min-width: 0; }
  tbody th { position: static; min-width: 0; }
  td.wide { min-width: 0; }
  figure img { max-width: 15cm; }
}
"""
