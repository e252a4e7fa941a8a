"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);

// Sorts the rows of a table by the column whose title is clicked.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column], first = cell.firstChild;
    const text = first && first.nodeType === Node.COMMENT_NODE ? first.data : cell.textContent.trim();
    const number = parseFloat(text.replaceAll(",", "").replace(/^</, ""));
    return text === "" || text === "-" ? -Infinity : Number.isNaN(number) || /^[^\d.+<-]/.test(text) ? text : number;
  };
  table.tHead.addEventListener("click", (event) => {
    const title = event.target.closest("th");
    if (!title || !event.target.closest("button")) return;
    const numeric = title.classList.contains("number");
    const before = title.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : numeric;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = title.cellIndex;
    const rows = [...body.rows].map((row) => [numeric ? Number(value(row, column)) : String(value(row, column)), row]);
    const order = numeric ? (a, b) => a[0] - b[0] : (a, b) => a[0].localeCompare(b[0], "en", { numeric: true });
    rows.sort((a, b) => (descending ? -order(a, b) : order(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}

// Shows the rows of a table that contain the text in the field that names it by data-filter.
for (const field of document.querySelectorAll("input[data-filter]")) {
  field.addEventListener("input", () => {
    for (const row of document.getElementById(field.dataset.filter).tBodies[0].rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(field.value.toLowerCase());
    }
  });
}

// Creates an element. Text never becomes markup.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
