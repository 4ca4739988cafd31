"use strict";
// Sorting, and saving the figures as a file. Without this script the page shows the same, unsorted.

function valueOf(row, column, isText) {
  const text = row.cells[column].textContent.trim();
  if (isText) return text;
  const value = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(value) ? null : value;
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

// A click sorts one way, the next one the other way, the third restores the order of the file. What has no value is last.
function makeSortable(table) {
  const body = table.tBodies[0];
  const original = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const isText = head.classList.contains("t");
    const turns = isText ? ["ascending", "descending"] : ["descending", "ascending"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const direction = turns[turns.indexOf(head.getAttribute("aria-sort")) + 1];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (direction === undefined) {
        body.append(...original);
        return;
      }
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const keyed = original.map((row) => [valueOf(row, column, isText), row]);
      const known = keyed.filter(([value]) => value !== null);
      const unknown = keyed.filter(([value]) => value === null);
      known.sort(([a], [b]) => sign * compare(a, b));
      body.append(...[...known, ...unknown].map(([, row]) => row));
    });
  });
}

document.querySelectorAll("table").forEach((table) => {
  if (table.tBodies[0].rows.length > 1) makeSortable(table);
});

const save = document.getElementById("save");
save.hidden = false;
save.addEventListener("click", () => {
  const text = document.getElementById("results").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

// Paper cannot be unfolded: browsers that print only what is open get everything opened.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
});
