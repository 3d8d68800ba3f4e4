"use strict";
// Draws the figures in the colours of the screen, shows and hides runs, and sorts tables.
const themes = JSON.parse(document.getElementById("themes").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set();
let printing = false;
function draw(plot) {
  const names = themes[dark.matches && !printing ? "dark" : "light"];
  const text = plot.nextElementSibling.textContent.replace(/"@(\w+)@([0-9a-f]*)"/g, (_, name, alpha) => `"${names[name]}${alpha}"`);
  const { data, layout } = JSON.parse(text);
  for (const trace of data) trace.visible = !hidden.has(String(trace.meta.run));
  // A line of the legend holds as many names as fit beside each other.
  const shown = layout.showlegend ? data.filter(trace => trace.showlegend && trace.visible) : [];
  // On paper two stand side by side, where the screen may have one.
  if (printing) layout.width = plot.closest(".one, .wide") ? 700 : 345;
  const wide = layout.width || plot.clientWidth || 320, longest = Math.max(0, ...shown.map(trace => trace.name.length));
  layout.height += 20 * Math.ceil(shown.length / Math.max(1, Math.floor(wide / (60 + 7 * longest))));
  return Plotly.react(plot, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}
const plots = () => [...document.querySelectorAll(".plot")].filter(plot => !plot.closest("details:not([open])"));
const drawAll = () => Promise.all(plots().map(draw));
// Plotly's script, a third as large as it is unpacked.
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}
const packed = document.getElementById("plotly");
(packed ? unpack(packed.textContent) : Promise.resolve()).then(drawAll).then(drawn => { document.documentElement.dataset.drawn = drawn.length; });
dark.addEventListener("change", drawAll);
addEventListener("beforeprint", () => { printing = true; drawAll(); });
addEventListener("afterprint", () => { printing = false; drawAll(); });
for (const details of document.querySelectorAll("details.surface")) details.addEventListener("toggle", () => {
  if (details.open) draw(details.querySelector(".plot"));
});
for (const box of document.querySelectorAll("nav input")) box.addEventListener("change", () => {
  const run = box.dataset.run;
  if (box.checked) hidden.delete(run); else hidden.add(run);
  for (const part of document.querySelectorAll(`.run-${run}, tr[data-run="${run}"]`)) part.classList.toggle("off", !box.checked);
  drawAll();
});
for (const button of document.querySelectorAll(".sorts button")) button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const at = head.cellIndex, up = head.getAttribute("aria-sort") === "descending";
  const key = row => {
    const cell = row.cells[at], value = cell.querySelector("data");
    return value ? Number(value.value) : cell.textContent.trim();
  };
  const order = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    const way = typeof a === "number" ? a - b : a.localeCompare(b);
    return up ? way : -way;
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
});
