"use strict";
// Sort a table by the column whose heading is pressed; a second press turns the order around.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const ascending = heading.getAttribute("aria-sort") === "descending" || (!heading.hasAttribute("aria-sort") && !heading.classList.contains("number"));
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = heading.classList.contains("number") ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
    const rows = [...table.tBodies[0].rows].sort((a, b) => (ascending ? 1 : -1) * compare(a, b));
    table.tBodies[0].append(...rows);
    headings.forEach((one) => one.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }));
}

// Show the rows of one sample.
document.getElementById("sample-filter")?.addEventListener("change", (event) => {
  for (const row of document.querySelectorAll("#proportions tbody tr")) {
    row.hidden = event.target.value !== "" && row.dataset.sample !== event.target.value;
  }
});

// Show and hide cell types in the three panels of the map.
const types = document.getElementById("types");
if (types) {
  const boxes = [...types.querySelectorAll("input")];
  const update = () => {
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    const map = Bokeh.documents[0];
    const cells = map.get_model_by_name("cells").data;
    const source = Array.from(cells.source), type = Array.from(cells.cell_type);
    for (const panel of ["test", "generated", "both"]) {
      map.get_model_by_name("shown_" + panel).booleans = source.map((of, i) => (panel === "both" || of === panel) && !hidden.has(type[i]));
    }
  };
  types.addEventListener("change", update);
  for (const button of types.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = Boolean(button.dataset.all);
      update();
    });
  }
}
