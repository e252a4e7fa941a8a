// The images and the confusion matrix of an evaluation report.
const LABEL = 0, PREDICTED = 1, PROBABILITY = 2, OWN = 3, FILE = 4, SHEET = 5, PLACE = 6;
const percent = (value) => `${(100 * value).toFixed(value > 0.9995 || value < 0.0995 ? 1 : 0)}\u00a0%`;

const sheets = DATA.sheets.map((source) => {
  const sheet = new Image();
  sheet.src = source;
  return sheet.decode().then(() => sheet);
});

// Copies a thumbnail from its sheet.
function thumbnail(image) {
  const [height, width] = DATA.tile, place = image[PLACE];
  const canvas = make("canvas", { width, height, role: "img", "aria-label": `Image ${image[FILE]}` });
  const left = (place % DATA.columns) * width, top = Math.floor(place / DATA.columns) * height;
  sheets[image[SHEET]].then((sheet) => {
    canvas.getContext("2d").drawImage(sheet, left, top, width, height, 0, 0, width, height);
  });
  return canvas;
}

function tile(row) {
  const image = DATA.images[row], wrong = image[LABEL] !== image[PREDICTED];
  const picture = image.length > SHEET ? thumbnail(image) : make("div", { class: "none" }, "no thumbnail");
  const caption = make("figcaption");
  const predicted = make("b", { class: wrong ? "predicted" : "label" }, DATA.classes[image[PREDICTED]]);
  caption.append(predicted, ` ${percent(image[PROBABILITY])}`, make("br"));
  if (wrong) {
    caption.append("label ", make("b", { class: "label" }, DATA.classes[image[LABEL]]), ` ${percent(image[OWN])}`);
  }
  caption.append(make("span", { class: "file" }, image[FILE]));
  return make("figure", {}, picture, caption);
}

for (const place of document.querySelectorAll("[data-list]")) {
  const rows = DATA.lists[place.dataset.list], first = Math.min(rows.length, 16);
  place.append(...rows.slice(0, first).map(tile));
  if (rows.length > first) {
    const more = make("button", { type: "button" }, `Show ${rows.length - first} more`);
    more.addEventListener("click", () => { more.remove(); place.append(...rows.slice(first).map(tile)); });
    place.after(more);
  }
}

// A dialog with images, for cells of the matrix and for classes.
const viewer = make("dialog", { "aria-labelledby": "viewer-title" });
const viewerTitle = make("h2", { id: "viewer-title" }), viewerText = make("p", { class: "muted" });
const viewerImages = make("div", { class: "images" }), close = make("button", { type: "button" }, "Close");
close.addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.append(make("header", {}, viewerTitle, close), viewerText, viewerImages);
document.body.append(viewer);

function show(title, rows, total) {
  viewerTitle.textContent = title;
  viewerText.textContent = rows.length < total ? `${rows.length} of ${total} images` : `${total} images`;
  viewerImages.replaceChildren(...rows.map(tile));
  viewer.showModal();
  viewer.scrollTop = 0;
}

function showCell(label, predicted) {
  const cell = DATA.cells[`${label},${predicted}`];
  if (!cell) return;
  const names = DATA.classes;
  const what = label === predicted ? `${names[label]}, classified correctly; least certain first`
    : `${names[label]}, classified as ${names[predicted]}`;
  show(what, cell.slice(1), cell[0]);
}

function showClass(label) {
  let rows = [], total = 0;
  for (const [key, cell] of Object.entries(DATA.cells)) {
    const [own, predicted] = key.split(",").map(Number);
    if (own === label && predicted !== label) { rows = rows.concat(cell.slice(1)); total += cell[0]; }
  }
  rows.sort((a, b) => DATA.images[b][PROBABILITY] - DATA.images[a][PROBABILITY]);
  show(`${DATA.classes[label]}, classified wrongly; most confident first`, rows.slice(0, 60), total);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-cell], [data-class]");
  if (!button) return;
  if (button.dataset.cell) showCell(...button.dataset.cell.split(",").map(Number));
  else showClass(Number(button.dataset.class));
});

// The matrix: a window of `span` x `span` cells of the full matrix, redrawn for each move.
const plot = document.getElementById("matrix");
if (plot) {
  const count = DATA.order.length, state = { top: 0, left: 0, span: count, row: 0, column: 0 };
  const status = document.getElementById("cell");
  const totals = DATA.order.map(() => 0);
  const place = new Map(DATA.order.map((label, index) => [label, index]));
  const cells = new Map();
  for (const [key, cell] of Object.entries(DATA.cells)) {
    const [row, column] = key.split(",").map((label) => place.get(Number(label)));
    cells.set(row * count + column, cell[0]);
    totals[row] += cell[0];
  }
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  let geometry = { margin: 0, size: 1 };

  const describe = (row, column) => {
    const images = cells.get(row * count + column) || 0, names = DATA.classes, label = DATA.order[row];
    const share = totals[row] ? ` (${((100 * images) / totals[row]).toFixed(1)}% of the class)` : "";
    const predicted = names[DATA.order[column]];
    const what = row === column ? `${names[label]}, correct` : `${names[label]}, classified as ${predicted}`;
    status.textContent = `${what}: ${images} images${share}`;
  };

  function draw() {
    const width = Math.max(280, plot.clientWidth), narrow = width < 500, { top, left, span } = state;
    const labeled = (width - 110) / span >= 10, margin = labeled ? (narrow ? 84 : 110) : 22;
    const size = (width - margin) / span;
    geometry = { margin, size };
    plot.setAttribute("viewBox", `0 0 ${width} ${width}`);
    const parts = [];
    const background = make("rect", { x: margin, y: margin, width: width - margin, height: width - margin });
    background.style.fill = "var(--paper)";
    parts.push(background);
    for (const [key, images] of cells) {
      const row = Math.floor(key / count), column = key % count;
      if (row < top || row >= top + span || column < left || column >= left + span) continue;
      const x = margin + (column - left) * size, y = margin + (row - top) * size;
      const strength = Math.sqrt(images / totals[row]);
      const box = make("rect", { x, y, width: size + 0.05, height: size + 0.05 });
      box.style.fill = row === column ? "var(--accent)" : "var(--wrong)";
      box.style.fillOpacity = row === column ? 0.12 + 0.8 * strength : 0.08 + 0.92 * strength;
      parts.push(box);
      if (size >= 20) {
        const text = make("text", { x: x + size / 2, y: y + size / 2, "text-anchor": "middle" }, String(images));
        text.setAttribute("dominant-baseline", "central");
        text.style.fontSize = `${Math.min(13, size / (String(images).length > 3 ? 2.8 : 2.1))}px`;
        parts.push(text);
      }
    }
    if (labeled) {
      const font = Math.min(13, size * 0.95), most = Math.floor((margin - 8) / (font * 0.54));
      const short = (text) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text);
      for (let index = 0; index < span; index++) {
        const middle = margin + (index + 0.5) * size;
        const own = make("text", { x: margin - 5, y: middle, "text-anchor": "end" });
        const other = make("text", { x: 0, y: 0, transform: `translate(${middle} ${margin - 5}) rotate(-90)` });
        own.textContent = short(DATA.classes[DATA.order[top + index]]);
        other.textContent = short(DATA.classes[DATA.order[left + index]]);
        for (const text of [own, other]) {
          text.setAttribute("dominant-baseline", "central");
          text.style.fontSize = `${font}px`;
          parts.push(text);
        }
      }
    } else {
      const own = make("text", { transform: `translate(11 ${(width + margin) / 2}) rotate(-90)` }, "label");
      const other = make("text", { x: (width + margin) / 2, y: 14 }, "predicted class");
      for (const text of [own, other]) {
        text.setAttribute("text-anchor", "middle");
        text.style.fontSize = "12px";
        parts.push(text);
      }
    }
    if (document.activeElement === plot) {
      const mark = make("rect", { width: size, height: size, fill: "none", "stroke-width": 2 });
      mark.setAttribute("x", margin + (state.column - left) * size);
      mark.setAttribute("y", margin + (state.row - top) * size);
      mark.style.stroke = "var(--ink)";
      parts.push(mark);
    }
    plot.replaceChildren(...parts);
  }

  function zoom(factor, row = state.top + state.span / 2, column = state.left + state.span / 2) {
    const span = clamp(Math.round(state.span * factor), Math.min(6, count), count);
    state.top = clamp(Math.round(row - span / 2), 0, count - span);
    state.left = clamp(Math.round(column - span / 2), 0, count - span);
    state.span = span;
    draw();
  }

  function move(rows, columns) {
    state.row = clamp(state.row + rows, 0, count - 1);
    state.column = clamp(state.column + columns, 0, count - 1);
    state.top = clamp(state.top, state.row - state.span + 1, state.row);
    state.left = clamp(state.left, state.column - state.span + 1, state.column);
    describe(state.row, state.column);
    draw();
  }

  const at = (event) => {
    const box = plot.getBoundingClientRect(), { margin, size } = geometry;
    const column = Math.floor((event.clientX - box.left - margin) / size) + state.left;
    const row = Math.floor((event.clientY - box.top - margin) / size) + state.top;
    const inside = event.clientX - box.left >= margin && event.clientY - box.top >= margin;
    return inside && row < count && column < count ? [row, column] : null;
  };
  const open = (row, column) => showCell(DATA.order[row], DATA.order[column]);

  let drag = null;
  plot.addEventListener("pointerdown", (event) => { drag = { at: at(event), moved: false }; });
  plot.addEventListener("pointermove", (event) => {
    const cell = at(event);
    if (!cell) return;
    describe(...cell);
    if (!drag || !drag.at || !event.buttons || state.span === count) return;
    const [rows, columns] = [drag.at[0] - cell[0], drag.at[1] - cell[1]];
    if (!rows && !columns) return;
    drag.moved = true;
    state.top = clamp(state.top + rows, 0, count - state.span);
    state.left = clamp(state.left + columns, 0, count - state.span);
    draw();
  });
  plot.addEventListener("click", (event) => {
    const cell = at(event);
    if (cell && !(drag && drag.moved)) { [state.row, state.column] = cell; describe(...cell); open(...cell); }
  });
  plot.addEventListener("dblclick", (event) => event.preventDefault());
  plot.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the page scrolls otherwise
    event.preventDefault();
    const cell = at(event);
    if (cell) zoom(event.deltaY > 0 ? 1.25 : 0.8, ...cell);
  }, { passive: false });
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (moves[event.key]) move(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") open(state.row, state.column);
    else if (event.key === "+" || event.key === "=") zoom(0.6, state.row, state.column);
    else if (event.key === "-") zoom(1.7, state.row, state.column);
    else return;
    event.preventDefault();
  });
  plot.addEventListener("focus", () => { describe(state.row, state.column); draw(); });
  plot.addEventListener("blur", draw);
  document.getElementById("zoom-in").addEventListener("click", () => zoom(0.6));
  document.getElementById("zoom-out").addEventListener("click", () => zoom(1.7));
  document.getElementById("zoom-all").addEventListener("click", () => zoom(count));
  for (const button of document.querySelectorAll("[data-find]")) {
    button.addEventListener("click", () => {
      const [row, column] = button.dataset.find.split(",").map((label) => place.get(Number(label)));
      Object.assign(state, { row, column });
      zoom(Math.min(1, 20 / state.span), row, column);
      describe(row, column);
    });
  }
  new ResizeObserver(draw).observe(plot);
  draw();
}
