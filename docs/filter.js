// A search box above each long table: rows without all of its words are hidden.
for (const table of document.querySelectorAll("article table")) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 20) continue;
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "Filter the rows: wan kohya";
  box.setAttribute("aria-label", "Filter the rows of the table below");
  box.style.cssText = "width: 100%; padding: .4em; margin-bottom: .5em; border: 1px solid; font: inherit";
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  table.before(box);
}
