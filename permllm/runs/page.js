"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = JSON.parse(document.getElementById("figures").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Numbers before words, empty ones last whichever the direction. */
const compare = (sign) => (one, other) => {
  if (one === "" || other === "") return (one === "") - (other === "");
  const [words, otherWords] = [one, other].map((text) => Number.isNaN(Number(text)));
  if (words !== otherWords) return words - otherWords;
  return sign * (words ? one.localeCompare(other, undefined, { numeric: true }) : one - other);
};

/** A line through the points that are shown: all of them, or those that are better than every faster one. */
function joined(trace, points) {
  const sign = trace.meta.join === "higher" ? -1 : 1;
  const sorted = points.map(({ x, y }) => [x[0], y[0]]).sort((one, other) => one[0] - other[0] || sign * (one[1] - other[1]));
  const kept = [];
  for (const [x, y] of sorted) if (trace.meta.join === "all" || kept.every((one) => sign * (y - one[1]) < 0)) kept.push([x, y]);
  return { ...trace, x: kept.map(([x]) => x), y: kept.map(([, y]) => y), line: { ...trace.line, color: colour("--quiet") }, hoverinfo: "skip" };
}

/** Draws one figure with the rows that are shown, in their order and in the colours of the moment. */
function draw(section, number, rows) {
  const { data, layout } = figures[number][section.querySelector("select").value];
  const place = section.querySelector(".plot");
  const narrow = place.clientWidth < 600;
  const [ink, quiet, grid, raised] = ["--ink", "--quiet", "--line", "--raised"].map(colour);
  const colours = colour("--series").split(" ");
  const groups = new Set();
  const points = data.filter(({ meta }) => rows.includes(meta.row))
    .sort((one, other) => rows.indexOf(one.meta.row) - rows.indexOf(other.meta.row))
    .map(({ marker, error_x, error_y, ...trace }) => {
      const color = colours[trace.meta.colour % colours.length];
      const dash = ["solid", "dash", "dot", "dashdot"][Math.floor(trace.meta.colour / colours.length) % 4];
      const showlegend = trace.showlegend ?? !groups.has(trace.legendgroup ?? trace);
      groups.add(trace.legendgroup);
      const hovertemplate = `%{text}${trace.x.length > 1 ? "<br>%{x}: %{y:.4g}" : ""}<extra></extra>`;
      const [x, y] = [error_x, error_y].map((error) => ({ ...error, visible: Boolean(error?.array[0]), color: ink }));
      return { ...trace, marker: { ...marker, color }, line: { color, dash }, error_x: x, error_y: y, showlegend, hovertemplate };
    });
  const bars = points.some(({ type }) => type === "bar");
  const [xaxis, yaxis] = [layout.xaxis, layout.yaxis].map((one) => ({ gridcolor: grid, zerolinecolor: grid, automargin: true, ...one }));
  if (bars) Object.assign(yaxis, { categoryarray: points.map(({ y }) => y[0]), autorange: "reversed" });
  // On a phone rows have their numbers in the table, and the select above says what is drawn.
  if (narrow) Object.assign(yaxis, bars ? { ticktext: yaxis.tickvals } : { title: { text: "" } });
  Plotly.react(place, [...points, ...data.filter(({ meta }) => meta.join).map((trace) => joined(trace, points))], {
    xaxis, yaxis, font: { color: ink, size: narrow ? 10 : 12 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    shapes: layout.shapes.map((one) => ({ ...one, line: { color: quiet, dash: "dash", width: 1 } })),
    height: bars ? 90 + 24 * Math.max(points.length, 2) : narrow ? 560 : 420,
    margin: { t: 24, r: 16, l: 40, b: 40 }, hovermode: "closest", dragmode: narrow ? false : "zoom",
    hoverlabel: { bgcolor: raised, font: { color: ink }, align: "left" }, legend: narrow ? { orientation: "h", y: -0.2 } : {},
    annotations: points.length ? [] : [{ text: "No row that is shown has this measure.", showarrow: false }],
  }, { responsive: true, displaylogo: false });
}

async function start() {
  for (const library of document.querySelectorAll(".library")) {
    const packed = Uint8Array.from(atob(library.textContent), (character) => character.charCodeAt(0));
    const text = new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(Object.assign(document.createElement("script"), { text: await text }));
  }
  const DataTable = itables.default;
  Object.assign(DataTable.ext.type.order, { "cell-asc": compare(1), "cell-desc": compare(-1) });
  const table = new DataTable("#table", {
    paging: false, autoWidth: false, order: [], columnDefs: [{ targets: "_all", type: "cell", orderSequence: ["asc", "desc"] }],
    layout: { topStart: "search", topEnd: { buttons: ["colvis", "copy", "csv"] }, bottomStart: "info", bottomEnd: null },
    language: { search: "Filter rows", info: "_TOTAL_ of _MAX_ rows", infoEmpty: "0 of _MAX_ rows", infoFiltered: "",
      buttons: { colvis: "Columns" } },
  });
  // A setting's whole value, not what begins with it: lcp is not lcp-paper, nor 110 steps 1100.
  const whole = (term) => new RegExp(`(^|\\s)${term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}($|[\\s,])`, "i");
  DataTable.ext.search.push((_, cells) =>
    table.search().replaceAll('"', "").split(/\s+/).filter((term) => /=./.test(term)).every((term) => cells.some((cell) => whole(term).test(cell))));
  const plots = [...document.querySelectorAll(".plots")];
  const shown = () => table.rows({ search: "applied" }).nodes().toArray().map((row) => Number(row.dataset.row));
  const drawAll = () => {
    document.documentElement.classList.toggle("dark", dark.matches);
    const rows = shown();
    plots.forEach((section, number) => draw(section, number, rows));
    for (const details of document.querySelectorAll("#runs details")) details.hidden = !rows.includes(Number(details.dataset.row));
  };
  const openNamed = () => document.querySelector("details:target")?.setAttribute("open", "");
  plots.forEach((section, number) => section.addEventListener("change", () => draw(section, number, shown())));
  table.on("draw", drawAll);
  dark.addEventListener("change", drawAll);
  addEventListener("hashchange", openNamed);
  drawAll();
  openNamed();
  document.documentElement.dataset.ready = "";
}

start();
