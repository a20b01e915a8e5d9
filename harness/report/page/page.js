// Draws the charts, filters rows and figures, opens everything for print.
"use strict";

const { config, specs } = JSON.parse(document.getElementById("charts").textContent);

// Rows came as lists under one list of names.
function unpacked(datasets) {
  const whole = ({ names, rows }) =>
    rows.map((row) => Object.fromEntries(names.map((name, at) => [name, row[at]])));
  return Object.fromEntries(Object.entries(datasets).map(([name, set]) => [name, whole(set)]));
}

// A telephone has room for one name of a system in a line.
config.legend.columns = innerWidth < 600 ? 1 : 2;

// One after the other, so that the page answers meanwhile. `ast`: Vega's expressions are
// interpreted, because the page's policy allows no script that is made at run time.
async function drawAll() {
  for (const [place, spec] of Object.entries(specs)) {
    await vegaEmbed(document.getElementById(place), {
      ...spec, config, datasets: unpacked(spec.datasets),
    }, {
      actions: false, ast: true, renderer: "svg",
    });
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.documentElement.dataset.charts = "drawn";
}

const form = document.querySelector(".filter");

function filter() {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  for (const element of document.querySelectorAll("[data-machine]")) {
    // what has no mark of a kind is of all
    element.hidden = wanted.some(([name, value]) => (element.dataset[name] || value) !== value);
  }
  for (const group of document.querySelectorAll("article.machine")) {
    group.hidden ||= !group.querySelector("tbody tr:not([hidden])");
  }
  for (const kind of document.querySelectorAll("section.kind")) {
    kind.hidden = !kind.querySelector("article:not([hidden])");
  }
  dispatchEvent(new Event("resize")); // charts that were hidden had no width
}

form.addEventListener("change", filter);
form.addEventListener("reset", () => setTimeout(filter));

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = details.dataset.forPrint = true;
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-for-print]")) {
    details.open = false;
    delete details.dataset.forPrint;
  }
});

drawAll();
