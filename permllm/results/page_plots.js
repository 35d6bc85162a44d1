"use strict";

// Plots as SVG. Colours come from the style sheet, so that they follow the colour scheme without being drawn again.

const SVG = "http://www.w3.org/2000/svg";
const SERIES_COLOURS = 8;
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

/** An element with attributes and children; text becomes a text node, never markup. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A dotted name that may break after each of its parts. */
function broken(name) {
  return name.split(/(?<=[._])/).flatMap((part) => [part, el("wbr")]);
}

/** Round positions that cover a range. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, index) => (first + index) * step);
}

/** A number on an axis: shares in percent, others as short as they can be told apart. */
function tickText(value, kind) {
  const share = kind === "accuracy" || kind === "share";
  return Number((share ? value * 100 : value).toPrecision(6)).toString() + (share ? "%" : "");
}

/** A mapping of [low, high] to pixels. */
function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

const measuring = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  measuring.font = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif';
  return measuring.measureText(text).width;
}

function shortened(text, width) {
  if (textWidth(text) <= width) return text;
  let length = text.length;
  while (length > 1 && textWidth(text.slice(0, length) + "…") > width) length -= 1;
  return text.slice(0, length) + "…";
}

function canvas(width, height, description) {
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": description },
    svg("title", {}, description),
  );
}

/** Whisker of an error bar along one axis. */
function whisker(x0, y0, x1, y1, cap) {
  const across = x0 === x1 ? [cap, 0] : [0, cap];
  const end = (x, y) => `M${x - across[0]} ${y - across[1]}L${x + across[0]} ${y + across[1]}`;
  return svg("path", { class: "error", d: `M${x0} ${y0}L${x1} ${y1}${end(x0, y0)}${end(x1, y1)}` });
}

/**
 * Bars, one a row: its label, its value, its uncertainty.
 * points: [{label, mean, error, text}]; measure: {heading, kind, dense}.
 */
function barPlot(points, measure, width) {
  const stacked = width < 560; // On a phone the label stands above its bar.
  const pitch = stacked ? 38 : 24;
  const labels = Math.min(width * 0.42, Math.max(...points.map((point) => textWidth(point.label))) + 14);
  const left = stacked ? 0 : labels;
  const values = Math.max(...points.map((point) => textWidth(point.text))) + 14;
  const top = 20;
  const bottom = top + points.length * pitch;
  const dense = measure.dense && measure.dense.mean !== null ? measure.dense.mean : null;
  const ends = [0, ...points.flatMap((point) => [point.mean + point.error, point.mean - point.error])];
  if (dense !== null) ends.push(dense);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const x = scale(low, high, left, width - values);
  const picture = canvas(width, bottom + 24, `${measure.heading} of ${points.length} rows, as bars`);
  for (const value of ticks(low, high, Math.max(2, (width - left - values) / 90))) {
    picture.append(
      svg("line", { class: "rule", x1: x(value), x2: x(value), y1: top, y2: bottom }),
      svg("text", { class: "quiet", x: x(value), y: bottom + 16, "text-anchor": value === low && stacked ? "start" : "middle" },
        tickText(value, measure.kind)),
    );
  }
  const words = []; // Drawn last, above every line.
  points.forEach((point, index) => {
    const start = top + index * pitch;
    const middle = start + (stacked ? 26 : pitch / 2);
    const [from, to] = [Math.min(x(0), x(point.mean)), Math.max(x(0), x(point.mean))];
    const end = Math.max(to, x(point.mean + point.error));
    const whole = svg("title", {}, `${point.label}: ${point.text}`);
    picture.append(
      svg("g", {}, whole,
        svg("rect", { class: "bar", x: from, y: middle - 7, width: Math.max(to - from, 1), height: 14, rx: 2 }),
        point.error ? whisker(x(point.mean - point.error), middle, x(point.mean + point.error), middle, 4) : null),
    );
    const place = stacked ? { x: 0, y: start + 13 } : { x: left - 8, y: middle + 4, "text-anchor": "end" };
    words.push(
      svg("text", place, whole.cloneNode(true), shortened(point.label, stacked ? width : labels - 12)),
      svg("text", { x: end + 8, y: middle + 4 }, point.text),
    );
  });
  if (dense !== null) {
    const right = x(dense) > width * 0.75;
    picture.append(svg("line", { class: "dense-line", x1: x(dense), x2: x(dense), y1: top - 4, y2: bottom }));
    words.push(svg("text", { class: "quiet", x: x(dense), y: 12, "text-anchor": right ? "end" : "start" }, `dense ${measure.dense.text}`));
  }
  picture.append(...words);
  return picture;
}

/** A line over one numeric setting. points: [{label, x, mean, error, text}]; setting: its name. */
function linePlot(points, measure, setting, width) {
  const sorted = [...points].sort((one, other) => one.x - other.x);
  const dense = measure.dense && measure.dense.mean !== null ? measure.dense.mean : null;
  const ends = sorted.flatMap((point) => [point.mean - point.error, point.mean + point.error]);
  if (dense !== null) ends.push(dense);
  const height = 320;
  const picture = canvas(width, height, `${measure.heading} against ${setting}, as a line`);
  const across = sorted.map((point) => point.x);
  // Settings that are doubled again and again would crowd at the left.
  const logarithmic = across[0] > 0 && across.at(-1) / across[0] >= 16;
  const label = logarithmic ? `${setting} (logarithmic)` : setting;
  const { x, y } = axes(picture, { width, height, kind: measure.kind, ends, across, places: across, label, logarithmic });
  if (dense !== null) {
    picture.append(
      svg("line", { class: "dense-line", x1: x.from, x2: x.to, y1: y(dense), y2: y(dense) }),
      svg("text", { class: "quiet", x: x.to, y: y(dense) - 6, "text-anchor": "end" }, `dense ${measure.dense.text}`),
    );
  }
  picture.append(svg("path", { class: "line", d: path(sorted.map((point) => [x(point.x), y(point.mean)])) }));
  for (const point of sorted) {
    picture.append(
      svg("g", {},
        svg("title", {}, `${setting} ${point.x}: ${point.text}`),
        point.error ? whisker(x(point.x), y(point.mean - point.error), x(point.x), y(point.mean + point.error), 4) : null,
        svg("circle", { class: "dot", cx: x(point.x), cy: y(point.mean), r: 4.5 })),
    );
  }
  return picture;
}

/** Curves over the entries of histories. series: [{row, label, number, values}]. */
function curvePlot(series, title, width) {
  const height = 240;
  const longest = Math.max(...series.map((one) => one.values.length));
  const picture = canvas(width, height, `${title} of ${series.length} runs while they learn`);
  const ends = series.flatMap((one) => one.values.filter((value) => value !== null));
  const whole = longest > 1 ? ticks(1, longest, 8).filter(Number.isInteger) : [1];
  const { x, y } = axes(picture, { width, height, kind: "", ends, across: [1, longest], places: whole, label: "pass" });
  for (const one of series) {
    const places = one.values.map((value, index) => (value === null ? null : [x(index + 1), y(value)]));
    const line = path(places);
    const group = svg("g", { class: "series", "data-row": one.row, style: `--colour: var(--series-${one.number % SERIES_COLOURS})` },
      svg("title", {}, one.label),
      svg("path", { d: line, "stroke-dasharray": dashes(one.number) }),
      svg("path", { class: "reach", d: line }));
    // Of long histories the line says enough.
    const marks = longest <= 24 ? places.filter((place) => place !== null) : [];
    group.append(...marks.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.75 })));
    picture.append(group);
  }
  return picture;
}

/** Dash pattern of a series; colour and pattern together stay apart for 32 of them. */
function dashes(number) {
  return DASHES[Math.floor(number / SERIES_COLOURS) % DASHES.length] || null;
}

/** A line through points; null interrupts it. */
function path(places) {
  let pen = "M";
  return places.map((place) => {
    const part = place === null ? "" : `${pen}${place[0]} ${place[1]}`;
    pen = place === null ? "M" : "L";
    return part;
  }).join("");
}

/** Draws both axes; returns their scales, which know where they start and end. */
function axes(picture, { width, height, kind, ends, across, places, label, logarithmic = false }) {
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low - room, high + room];
  const rungs = ticks(low, high, 5);
  const left = Math.max(...rungs.map((value) => textWidth(tickText(value, kind)))) + 10;
  const [top, bottom, right] = [10, height - 38, width - 12];
  const y = scale(low, high, bottom, top);
  const bend = logarithmic ? Math.log : Number;
  const [first, last] = [bend(Math.min(...across)), bend(Math.max(...across))];
  const straight = scale(first, last, left + 10, right);
  const x = first === last ? () => (left + right) / 2 : (value) => straight(bend(value));
  x.from = left;
  x.to = right;
  for (const value of rungs) {
    picture.append(
      svg("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { class: "quiet", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value, kind)),
    );
  }
  let free = -Infinity; // Where the next label may begin.
  for (const value of places) {
    const text = tickText(value, "");
    const half = textWidth(text) / 2;
    if (x(value) - half < free) continue;
    free = x(value) + half + 8;
    picture.append(svg("text", { class: "quiet", x: Math.min(x(value), width - half), y: bottom + 18, "text-anchor": "middle" }, text));
  }
  picture.append(svg("text", { class: "quiet", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, label));
  return { x, y };
}
