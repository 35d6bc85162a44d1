// Pictures of orders and masks on canvas. They are drawn with the colours of the moment, so a change of scheme draws them again.

const redraw = [];

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw.forEach((draw) => draw()));

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Where each channel went: position in permuted order to the right, original position upwards. */
function orderPicture({ name, channels, moved, points }) {
  const size = 304; // Twice the size on the page, for sharp dots.
  const share = `${(moved * 100).toFixed(1)}% moved`;
  const picture = el("canvas", { width: size, height: size, role: "img", "aria-label": `order of ${name}, ${share}` });
  const draw = () => {
    const pen = picture.getContext("2d");
    pen.fillStyle = colour("--ground");
    pen.fillRect(0, 0, size, size);
    pen.fillStyle = colour("--accent");
    const dot = channels > 400 ? 2.5 : channels > 100 ? 4 : 6;
    points.forEach((original, index) => {
      const position = Math.floor((index * channels) / points.length);
      const x = ((position + 0.5) / channels) * size;
      const y = size - ((original + 0.5) / channels) * size;
      pen.fillRect(x - dot / 2, y - dot / 2, dot, dot);
    });
  };
  redraw.push(draw);
  draw();
  const sample = points.length < channels ? `, ${points.length} of them drawn` : "";
  return el("figure", {}, picture, el("figcaption", {}, ...broken(name), el("br"), `${channels} channels${sample}, ${share}`));
}

/** A corner of a mask, a pixel a weight, coloured where the weight is kept. */
function maskPicture({ name, shape, rows, columns, bits }) {
  const label = `mask of ${name}, the first ${rows} rows and ${columns} channels`;
  const picture = el("canvas", { class: "mask", width: columns, height: rows, role: "img", "aria-label": label });
  const bytes = Uint8Array.from(atob(bits), (character) => character.charCodeAt(0));
  const draw = () => {
    const pen = picture.getContext("2d");
    pen.fillStyle = colour("--raised");
    pen.fillRect(0, 0, columns, rows);
    pen.fillStyle = colour("--bar");
    for (let index = 0; index < rows * columns; index += 1) {
      if ((bytes[index >> 3] >> (7 - (index & 7))) & 1) pen.fillRect(index % columns, Math.floor(index / columns), 1, 1);
    }
  };
  redraw.push(draw);
  draw();
  const size = `${rows} × ${columns} of ${shape[0]} × ${shape[1]}`;
  return el("figure", {}, picture, el("figcaption", {}, ...broken(name), el("br"), size));
}
