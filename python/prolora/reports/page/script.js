"use strict";
// Sorting and filtering of tables. Without this, rows are in the order of the model.

// The number that a cell's text begins with; NaN where there is none, as in "–".
function readNumber(text) {
  return parseFloat(text.replace("−", "-"));
}

// Orders two cells: numbers by value, before texts; texts by the alphabet, with numbers in them.
function compareCells(a, b) {
  const x = readNumber(a), y = readNumber(b);
  if (!isNaN(x) && !isNaN(y)) return x - y;
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return a.localeCompare(b, "en", { numeric: true });
}

// Texts -> their order as indices. A dash stays last either way; equals keep their order.
function sortOrder(texts, descending) {
  const sign = descending ? -1 : 1;
  return texts.map((_, i) => i).sort((i, j) => {
    const empty = (texts[i] === "–") - (texts[j] === "–");
    return empty || sign * compareCells(texts[i], texts[j]) || i - j;
  });
}

// Whether a row holds every word that was asked for, and the status.
function rowMatches(text, status, query, wanted) {
  if (wanted && status !== wanted) return false;
  const lower = text.toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => lower.includes(word));
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      const rows = [...table.tBodies[0].rows];
      const order = sortOrder(rows.map((row) => row.cells[column].textContent), descending);
      table.tBodies[0].append(...order.map((i) => rows[i]));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}

function makeFilterable(table) {
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent]);
  const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === "status");
  const status = (row) => row.cells[place].textContent;
  const form = document.createElement("div"), text = document.createElement("input");
  const select = document.createElement("select"), count = document.createElement("output");
  form.className = "filter";
  text.type = "search";
  text.placeholder = "attn2 to_k";
  [["", "all"], ...[...new Set(rows.map(([row]) => status(row)))].map((name) => [name, name])].forEach(
    ([value, name]) => select.append(new Option(name, value)));
  const label = (name, field) => {
    const element = document.createElement("label");
    element.append(name + " ", field);
    return element;
  };
  form.append(label("Show rows with", text), label("status", select), count);
  const filter = () => {
    let shown = 0;
    rows.forEach(([row, words]) => {
      row.hidden = !rowMatches(words, status(row), text.value.trim(), select.value);
      shown += !row.hidden;
    });
    count.textContent = shown + " of " + rows.length;
  };
  text.addEventListener("input", filter);
  select.addEventListener("change", filter);
  filter();
  table.parentNode.before(form);
}

if (typeof document === "undefined") {
  module.exports = { compareCells, sortOrder, rowMatches };
} else {
  document.querySelectorAll("#modules, .index table").forEach(makeSortable);
  document.querySelectorAll("#modules").forEach(makeFilterable);
}
