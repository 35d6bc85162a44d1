// The table, and what follows its filter: plots and runs.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const CURVES = {
  loss: "Loss, mean of the pass",
  measured_loss: "Measured loss of the order after the pass",
  temperature: "Temperature",
  flips: "Share of channels that changed place",
};
const state = { column: -1, descending: false, words: [], measure: data.main, pinned: null };
const settings = data.columns.filter((column) => column.setting).length;

// What the filter looks at: the cells, and each setting with its name.
const haystacks = data.rows.map((row, index) => {
  const named = data.columns.map((column, position) => (column.setting ? `${column.name}=${row.cells[position]}` : ""));
  const hashes = row.runs.map((run) => data.runs[run].hash);
  return [`#${index + 1}`, row.label, ...row.cells, ...named, ...hashes].join("\n").toLowerCase();
});

/** Indices of the rows that all words of the filter match, in the order of the table. */
function shownRows() {
  const rows = data.rows.map((_, index) => index).filter((index) => state.words.every((word) => haystacks[index].includes(word)));
  const sign = state.descending ? -1 : 1;
  const key = (index) => (state.column < 0 ? index : data.rows[index].keys[state.column]);
  return rows.sort((one, other) => compare(key(one), key(other), sign) || one - other);
}

/** Numbers before words, empty ones last whichever the direction. */
function compare(one, other, sign) {
  if (one === null || other === null) return (one === null) - (other === null);
  if (typeof one !== typeof other) return sign * (typeof one === "number" ? -1 : 1);
  return sign * (typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true }));
}

/** Positions of the columns to show, for these rows. */
function shownColumns(rows) {
  const positions = data.columns.map((_, position) => position);
  const varies = (position) => new Set(rows.map((row) => data.rows[row].cells[position])).size > 1;
  const chosen = byId("varying").checked && rows.length > 1
    ? positions.filter((position) => !data.columns[position].setting || varies(position))
    : positions;
  if (!byId("numbers-first").checked) return chosen;
  return [...chosen.filter((position) => position >= settings), ...chosen.filter((position) => position < settings)];
}

function header(columns) {
  const cell = (position, name, kind) => {
    const sorted = state.column === position ? (state.descending ? "descending" : "ascending") : "none";
    const arrow = sorted === "none" ? "" : state.descending ? "▼" : "▲";
    // Long names get two or three lines, not one a word.
    const width = `min-width: ${Math.min(18, Math.ceil(name.length / 2.5))}ch`;
    const button = el("button", { type: "button", "data-column": position }, el("span", { style: width }, ...broken(name)),
      el("span", { class: "arrow", "aria-hidden": "true" }, arrow));
    return el("th", { scope: "col", class: kind, "aria-sort": sorted }, button);
  };
  return el("tr", {}, cell(-1, "#", "first"),
    ...columns.map((position) => cell(position, data.columns[position].name, data.columns[position].setting ? "" : "number")));
}

function body(columns, cells, first, baseline = false) {
  return [
    el("th", { scope: "row", class: "first" }, first, baseline ? el("span", { class: "tag" }, "baseline") : null),
    ...columns.map((position) => el("td", { class: data.columns[position].setting ? "" : "number" }, cells[position])),
  ];
}

function renderTable(rows) {
  const columns = shownColumns(rows);
  const table = byId("table");
  const focused = document.activeElement?.dataset?.column;
  table.tHead.replaceChildren(header(columns));
  table.classList.toggle("many", columns.length > 14);
  if (focused !== undefined) table.querySelector(`button[data-column="${focused}"]`)?.focus();
  if (data.dense) {
    // Where columns are reordered, the word "dense" stays in front.
    const cells = settings ? ["", ...data.dense.slice(1)] : data.dense;
    table.tBodies[0].replaceChildren(el("tr", {}, ...body(columns, cells, "dense")));
  }
  table.tBodies[1].replaceChildren(...rows.map((index) => {
    const row = data.rows[index];
    const link = el("a", { href: `#run-${row.runs[0]}`, title: row.label, "aria-label": `row ${index + 1}: ${row.label}` },
      String(index + 1));
    return el("tr", { "data-row": index }, ...body(columns, row.cells, link, row.baseline));
  }));
  byId("count").value = `${rows.length} of ${data.rows.length} rows`;
}

function renderPlots(rows) {
  const measure = data.measures.find((one) => one.name === state.measure);
  const place = byId("main-plot");
  if (measure) {
    const points = rows
      .filter((index) => data.rows[index].measures[measure.name]?.mean !== null && data.rows[index].measures[measure.name])
      .map((index) => ({
        label: `${index + 1}  ${data.rows[index].label}`,
        x: data.rows[index].x,
        ...data.rows[index].measures[measure.name],
      }));
    const width = Math.max(280, place.clientWidth);
    const picture = !points.length ? null
      : data.numeric && points.every((point) => point.x !== null)
        ? linePlot(points, measure, data.numeric, Math.min(width, 760))
        : barPlot(points, measure, Math.min(width, 1100));
    place.replaceChildren(picture ?? el("p", { class: "hint" }, "No row that is shown has this measure."));
  }
  renderCurves(rows);
}

function renderCurves(rows) {
  const learned = [...rows].sort((one, other) => one - other).filter((index) => data.rows[index].series !== null);
  byId("curves").hidden = !learned.length;
  const grid = byId("curve-plots");
  const figures = Object.entries(CURVES).map(([key, title]) => {
    const series = learned.flatMap((index) => data.rows[index].runs
      .filter((run) => data.runs[run].curves[key])
      .map((run) => ({
        row: index,
        label: `${index + 1}  ${data.rows[index].label}, seed ${data.runs[run].seed}`,
        number: data.rows[index].series,
        values: data.runs[run].curves[key],
      })));
    return series.length ? [series, title, el("div", { class: "plot" })] : null;
  }).filter((figure) => figure !== null);
  grid.replaceChildren(...figures.map(([, title, place]) => el("figure", {}, el("figcaption", {}, title), place)));
  for (const [series, title, place] of figures) place.append(curvePlot(series, title, Math.max(260, place.clientWidth)));
  byId("legend").replaceChildren(...learned.map((index) => {
    const number = data.rows[index].series;
    const swatch = svg("svg", { width: 30, height: 10, "aria-hidden": "true", style: `--colour: var(--series-${number % SERIES_COLOURS})` },
      svg("line", { x1: 0, x2: 30, y1: 5, y2: 5, "stroke-dasharray": dashes(number) }));
    const label = `${index + 1}  ${data.rows[index].label}`;
    const pressed = String(state.pinned === index);
    const button = el("button", { type: "button", title: label, "data-row": index, "aria-pressed": pressed },
      swatch, el("span", {}, label));
    return el("li", {}, button);
  }));
  highlight(state.pinned);
}

/** Brings the curves of one row forward, or of none. */
function highlight(row) {
  const area = byId("curves");
  const some = row !== null && area.querySelector(`.series[data-row="${row}"]`) !== null;
  area.classList.toggle("highlighting", some);
  for (const part of area.querySelectorAll("[data-row]")) part.classList.toggle("hot", some && Number(part.dataset.row) === row);
}

function rowOf(event) {
  const part = event.target.closest?.("[data-row]");
  return part ? Number(part.dataset.row) : null;
}

/** A small table. headings: null for none; kinds: class of each column. */
function small(headings, lines, kinds) {
  const line = (cells) => el("tr", {}, ...cells.map((text, position) => (position
    ? el("td", { class: kinds[position] }, text)
    : el("th", { scope: "row" }, ...broken(text)))));
  const heads = headings?.map((text, position) => (text
    ? el("th", { scope: "col", class: kinds[position] }, text)
    : el("td")));
  return el("table", {}, heads ? el("thead", {}, el("tr", {}, ...heads)) : null, el("tbody", {}, ...lines.map(line)));
}

function part(title, content) {
  return el("section", {}, el("h4", {}, title), content);
}

function duration(seconds) {
  return seconds < 100 ? seconds.toFixed(1) : seconds.toFixed(0);
}

function pictureParts(title, explanation, found, draw) {
  if (typeof found === "string") return part(title, el("p", {}, found));
  const content = el("div", {}, el("p", { class: "hint" }, explanation), el("div", { class: "pictures" }, ...found.map(draw)));
  return part(title, content);
}

function runContent(run) {
  const stages = Object.entries(run.seconds);
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  const lines = run.measures.map(([name, dense, sparse, limited]) => [limited ? `${name} (limited)` : name, dense, sparse]);
  const number = "number";
  return el("div", { class: "run" },
    run.warnings.length
      ? part("Mind", el("ul", { class: "warnings" }, ...run.warnings.map((text) => el("li", {}, text))))
      : null,
    el("div", { class: "columns" },
      part("Measures", small(["", "dense", "sparse"], lines, ["", number, number])),
      part("Seconds by stage",
        small(null, [...stages.map(([name, seconds]) => [name, duration(seconds)]), ["all", duration(total)]], ["", number])),
      part("Settings that are not the usual ones", run.differs.length
        ? small(["setting", "here", "usual"], run.differs, ["", "value", "value"])
        : el("p", {}, "None.")),
      part("Environment", el("div", {},
        small(null, [...run.environment, ["directory", run.directory], ["config hash", run.hash]], ["", "long"]),
        run.versions.length ? el("p", { class: "hint" }, run.versions.join(", ")) : null))),
    pictureParts("Permutations",
      "Position in permuted order to the right, original position upwards; a diagonal is the model's own order.",
      run.permutations, orderPicture),
    pictureParts("Masks",
      "Upper left corner in original channel order: outputs downwards, input channels to the right; kept weights are coloured.",
      run.masks, maskPicture));
}

function runDetails(run, index) {
  const row = data.rows[run.row];
  const measure = data.main ? run.measures.find(([name]) => name === data.main) : null;
  const facts = [`seed ${run.seed}`, measure ? `${measure[0]} ${measure[2]}` : "", run.hash].filter(Boolean).join(" · ");
  const details = el("details", { id: `run-${index}`, "data-row": run.row },
    el("summary", {}, `${run.row + 1}  ${row.label} `, el("span", { class: "quiet" }, facts)));
  // Built when it is first opened: pictures of many runs at once would be slow.
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(runContent(run));
  });
  return details;
}

function render() {
  const rows = shownRows();
  renderTable(rows);
  renderPlots(rows);
  const kept = new Set(rows);
  for (const details of byId("runs").children) details.hidden = !kept.has(Number(details.dataset.row));
}

/** Opens the run that the address names. */
function openNamed() {
  const details = /^#run-\d+$/.test(location.hash) ? document.querySelector(location.hash) : null;
  if (!details) return;
  details.open = true;
  details.scrollIntoView();
}

function start() {
  const runs = data.runs.length;
  byId("summary").textContent = `${runs} finished ${runs === 1 ? "run" : "runs"} in ${data.rows.length} `
    + `${data.rows.length === 1 ? "row" : "rows"}; runs that differ only in their seed share one.`;
  byId("notes").hidden = !data.notes.length;
  byId("notes").querySelector("ul").append(...data.notes.map((note) => el("li", {}, note)));
  byId("measure").append(...data.measures.map(({ name, heading }) => el("option", { value: name }, heading)));
  state.measure = data.main ?? data.measures[0]?.name ?? null;
  byId("measure").value = state.measure;
  // With many settings the numbers would be out of sight.
  byId("numbers-first").checked = settings > 6;
  byId("numbers-first-label").hidden = byId("varying-label").hidden = settings < 3;
  byId("runs").append(...data.runs.map(runDetails));

  byId("filter").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    render();
  });
  byId("table").tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const column = Number(button.dataset.column);
    state.descending = column === state.column && !state.descending;
    state.column = column;
    render();
  });
  for (const id of ["numbers-first", "varying"]) byId(id).addEventListener("change", render);
  byId("measure").addEventListener("change", (event) => {
    state.measure = event.target.value;
    renderPlots(shownRows());
  });

  const curves = byId("curves");
  curves.addEventListener("pointerover", (event) => highlight(rowOf(event) ?? state.pinned));
  curves.addEventListener("pointerleave", () => highlight(state.pinned));
  curves.addEventListener("focusin", (event) => highlight(rowOf(event) ?? state.pinned));
  curves.addEventListener("focusout", () => highlight(state.pinned));
  byId("legend").addEventListener("click", (event) => {
    const row = rowOf(event);
    if (row === null) return;
    state.pinned = state.pinned === row ? null : row;
    for (const button of byId("legend").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.row) === state.pinned));
    }
    highlight(state.pinned);
  });

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) renderPlots(shownRows());
    width = innerWidth;
  });
  addEventListener("hashchange", openNamed);
  byId("table").addEventListener("click", (event) => {
    // The same link again changes no address, and must still open its run.
    if (event.target.closest("a")) setTimeout(openNamed);
  });
  render();
  openNamed();
}

start();
