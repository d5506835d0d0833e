"""The style sheet of the report, for laptop, phone and paper."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 0.6rem; border-bottom: 2px solid #0072B2; }
h3 { font-size: 1.1rem; margin: 1.2rem 0 0.4rem; }
h4 { font-size: 1rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
p { max-width: 70ch; overflow-wrap: anywhere; }
.warning { border-left: 6px solid #D55E00; padding: 0.5rem 0.8rem; background: #fdf1ea; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.8rem;
  margin: 1rem 0; }
.facts div { border: 1px solid #ccc; border-radius: 6px; padding: 0.6rem 0.8rem; }
.facts dt { color: #444; }
.facts dd { margin: 0; font-size: 1.6rem; font-weight: 600; }
.facts dd + dd { font-size: 0.9rem; font-weight: 400; color: #444; }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); align-items: start; }
.grid > * { min-width: 0; max-width: 34rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: flex-start; }
.tables > * { min-width: 0; max-width: 100%; }
.tables figcaption { width: 0; min-width: 100%; }
figure { margin: 0; }
figure > svg { width: 100%; height: auto; display: block; }
figcaption { color: #333; font-size: 0.92rem; padding: 0.3rem 0; }
path.grid { stroke: #ddd; fill: none; }
path.axis { stroke: #222; fill: none; }
path.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
path.dot { stroke-width: 7; stroke-linecap: round; stroke-dasharray: none; }
svg text { font: 12px system-ui, sans-serif; fill: #222; }
svg text.label { font-size: 13px; }
svg text.small { font-size: 10px; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0.2rem 0;
  padding: 0; font-size: 0.88rem; }
.legend svg { margin-right: 0.4rem; vertical-align: middle; }
.opening { font-size: 1.25rem; font-weight: 500; }
dd { margin: 0 0 0.4rem 1rem; }
/* Shadows at the sides show that a table can be scrolled. */
.wide { overflow-x: auto; margin: 0 0 1rem;
  background: linear-gradient(to right, #fff 1rem, #fff0),
    linear-gradient(to left, #fff 1rem, #fff0),
    linear-gradient(to right, #0003, #0000 0.6rem), linear-gradient(to left, #0003, #0000 0.6rem);
  background-position: left, right, left, right; background-repeat: no-repeat;
  background-size: 2rem 100%, 2rem 100%, 1rem 100%, 1rem 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.5rem; border-bottom: 1px solid #ddd; text-align: right; }
td { white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 500; }
.confusion td { text-align: center; min-width: 2.6rem; }
.belief { width: 100%; }
.belief td { min-width: 3.6rem; }
.belief .track { height: 0.45rem; background: #eee; }
.belief .bar { display: block; height: 100%; background: #56B4E9; }
.strip { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.strip > div { flex: 1 1 4.5rem; max-width: 14rem; min-width: 0; }
.strip img { width: 100%; height: auto; display: block; image-rendering: auto; }
.strip span { font-size: 0.85rem; overflow-wrap: anywhere; }
.case { border: 1px solid #ccc; border-radius: 6px; padding: 0.8rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: 0.8rem; font-size: 0.85rem; }
@media (max-width: 600px) {
  table { font-size: 0.8rem; }
  th, td { padding: 0.15rem 0.3rem; }
  .belief td { min-width: 2.8rem; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .grid { grid-template-columns: 1fr 1fr; }
  table { font-size: 8.5pt; }
  th, td { padding: 0.1rem 0.3rem; }
  figure, .case, tr, .facts div { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
