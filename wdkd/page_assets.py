"""The page's style and its script."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fdfdfc; --ink: #1c1e21; --quiet: #5c6370; --line: #d9dce1; --head: #f0f2f5; --link: #0b5cad;
  --best: #e3f1e6; --warning: #fff4d6; --warning-line: #d49a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --ink: #e3e5e8; --quiet: #9aa2ad; --line: #343941; --head: #20242a; --link: #7ab8ff;
    --best: #1d3a26; --warning: #3a2f10; --warning-line: #d9a520;
  }
  .plot img { filter: invert(1) hue-rotate(180deg); }
}
body {
  margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 4rem; max-width: 72rem;
  background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 0.5rem; padding-bottom: 0.2rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font: 0.9em ui-monospace, monospace; }
nav { margin: 1.5rem 0; padding: 0.2rem 1rem 0.8rem; border: 1px solid var(--line); border-radius: 6px; }
nav h2 { font-size: 1rem; margin: 0.6rem 0 0.2rem; border: 0; padding: 0; }
nav ul { margin: 0; padding-left: 1.2rem; }
.facts { padding-left: 1.2rem; }
.warnings { list-style: none; padding: 0; }
.warnings li {
  max-width: none; margin: 0.3rem 0; padding: 0.4rem 0.7rem;
  background: var(--warning); border-left: 4px solid var(--warning-line); border-radius: 3px;
}
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { background: var(--head); vertical-align: bottom; }
tbody th, tfoot th { position: sticky; left: 0; background: var(--ground); font-weight: 600; }
th.published { padding-left: 1.6rem; }
.published { color: var(--quiet); font-style: italic; font-weight: 400; }
.absent { color: var(--quiet); }
td.best { background: var(--best); font-weight: 700; }
tfoot th, tfoot td { border-bottom: 0; color: var(--quiet); font-weight: 400; }
tfoot tr:first-child > * { border-top: 2px solid var(--line); }
thead button { all: unset; cursor: pointer; white-space: nowrap; }
thead button:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
thead button::after { content: "\\2195"; padding-left: 0.35em; color: var(--quiet); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193"; color: inherit; }
.plot { max-width: none; overflow-x: auto; }
.plot img { max-width: 100%; height: auto; }
@media (max-width: 40rem) { .plot img { max-width: none; } }
@media print {
  :root {
    --ground: #fff; --ink: #000; --quiet: #444; --line: #bbb; --head: #eee; --link: #000;
    --best: #e8e8e8; --warning: #fff; --warning-line: #000;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, thead button::after { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { white-space: normal; }
  tr, .plot { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .plot img { filter: none; max-width: 100%; }
}
"""

SORTED = """
const isNumber = (key) => Number.isFinite(Number.parseFloat(key)) && Number.isFinite(Number(key));

// The order of rows by their keys in one column: numbers by size, then words; equal ones as they were, those without a key last.
function sortedRows(keys, descending) {
  const rank = (a, b) => {
    if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
    const [x, y] = isNumber(a) ? [Number(a), Number(b)] : [a, b];
    return x < y ? -1 : x > y ? 1 : 0;
  };
  const rows = keys.map((_, row) => row);
  const present = rows.filter((row) => keys[row] !== undefined);
  present.sort((a, b) => descending ? rank(keys[b], keys[a]) : rank(keys[a], keys[b]));
  return [...present, ...rows.filter((row) => keys[row] === undefined)];
}
"""
"""In JavaScript: keys are strings, or undefined."""

SCRIPT = (
    SORTED
    + """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  heads.forEach((head, column) => {
    const keys = rows.map((row) => row.cells[column].dataset.key);
    const orders = keys.some(isNumber) ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
      body.append(...(order === "none" ? rows : sortedRows(keys, order === "descending").map((row) => rows[row])));
    });
  });
}
"""
)
