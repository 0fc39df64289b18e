"use strict";

// Divider between float and quantized pictures.
for (const figure of document.querySelectorAll(".comparison")) {
  const slider = figure.querySelector("input");
  const move = () => figure.style.setProperty("--split", `${slider.value}%`);
  slider.addEventListener("input", move);
  move();
}

// Search in the table of encodings: every word has to occur in the row.
const search = document.getElementById("search");
if (search) {
  const rows = [...document.querySelectorAll("#encodings tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    rows.forEach((row, index) => {
      row.hidden = !words.every((word) => texts[index].includes(word));
      found += !row.hidden;
    });
    document.getElementById("found").textContent = `${found} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  filter();
}

const models = () => (window.Bokeh ? Bokeh.documents.flatMap((page) => [...page.all_models]) : []);

// The tensor whose values are drawn on their integer grid.
const picker = document.getElementById("tensor");
let show = () => {};
if (picker) {
  const { rows, histograms } = JSON.parse(document.getElementById("tensors").textContent);
  picker.addEventListener("change", () => show(Number(picker.value)));

  show = (index) => {
    const { ends, data } = histograms[index];
    document.getElementById("tensor-text").textContent = Object.entries(rows[index])
      .filter(([name, value]) => value && name !== "layer" && name !== "tensor")
      .map(([name, value]) => `${name}: ${value}`)
      .join(" · ");
    let end = 0;
    for (const model of models()) {
      if (model.name === "histogram") model.data = data;
      if (model.tags?.includes("end of the grid")) model.location = ends[end++];
    }
  };
}

// The colors of text and lines in the charts follow the page's.
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
const paint = () => {
  const style = getComputedStyle(document.documentElement);
  const [text, soft, line] = ["--text", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
  for (const model of models()) {
    if (/Axis$/.test(model.type)) {
      model.setv({
        axis_label_text_color: soft, major_label_text_color: text, axis_line_color: line,
        major_tick_line_color: line, minor_tick_line_color: null,
      });
      if (model.type === "CategoricalAxis") model.setv({ group_text_color: text, separator_line_color: line });
    } else if (model.type === "Title") model.setv({ text_color: text });
    else if (model.type === "Legend") model.setv({ label_text_color: text });
    else if (model.type === "LabelSet") model.setv({ text_color: text });
    else if (model.type === "Grid") model.setv({ grid_line_color: line });
  }
};
scheme.addEventListener("change", paint);

// Bokeh makes its charts when the page has loaded.
const begin = (tries) => {
  if (models().length) {
    paint();
    if (picker) show(Number(picker.value));
  } else if (tries) setTimeout(begin, 50, tries - 1);
};
begin(200);
