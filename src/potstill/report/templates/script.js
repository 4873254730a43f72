"use strict";
// Comfort only: tooltips, choosing a step, opening a chunk. Without it everything is on the page, one below the other.
const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}

function hideTip() {
  tip.hidden = true;
  document.querySelectorAll(".cursor").forEach((line) => line.remove());
}

// Tokens: our tooltip in place of the browser's slow one.
function tokenTip(event) {
  const token = event.target.closest(".response i");
  if (!token) return false;
  if (token.title) {
    token.dataset.tip = token.title;
    token.removeAttribute("title");
  }
  showTip(token.dataset.tip, event.clientX, event.clientY);
  return true;
}

// Charts: what every line says at the point nearest to the pointer.
function chartTip(event) {
  const chart = event.target.closest("svg.chart");
  if (!chart) return false;
  const box = chart.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
  const nearest = [...chart.querySelectorAll(".series")].map((series) => {
    const all = (series.points ??= JSON.parse(series.dataset.hover));
    return [series.dataset.name, all.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))];
  });
  const at = nearest.map(([, point]) => point).reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const there = nearest.filter(([, point]) => Math.abs(point[0] - at[0]) < 2);
  chart.querySelector(".cursor")?.remove();
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const ends = { class: "cursor", x1: at[0], x2: at[0], y1: chart.dataset.top, y2: chart.dataset.bottom };
  for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value);
  chart.append(line);
  const rows = there.map(([name, point]) => name + ": " + point[3]);
  showTip([chart.dataset.x + " " + at[2], ...rows].join("\n"), event.clientX, event.clientY);
  return true;
}

document.addEventListener("pointermove", (event) => {
  if (!tokenTip(event) && !chartTip(event) && !tip.hidden) hideTip();
});
document.addEventListener("pointerdown", tokenTip);
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// One kept step of a run at a time.
for (const run of document.querySelectorAll("[data-run]")) {
  const buttons = run.querySelectorAll("button[data-step]");
  const choose = (step) => {
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.step === step);
    for (const kept of run.querySelectorAll(".kept")) kept.hidden = kept.dataset.step !== step;
  };
  buttons.forEach((button) => button.addEventListener("click", () => choose(button.dataset.step)));
  buttons[0].parentElement.hidden = buttons.length < 2;
  choose(buttons[0].dataset.step);
}

// A click on an underlined stretch opens what the teacher wrote there.
function openChunk() {
  const id = decodeURIComponent(location.hash.slice(1));
  const target = id && document.getElementById(id);
  if (!target) return;
  const kept = target.closest(".kept");
  if (kept?.hidden) kept.closest("[data-run]").querySelector(`button[data-step="${kept.dataset.step}"]`).click();
  if (target.tagName === "DETAILS") target.open = true;
  target.scrollIntoView({ block: "nearest" });
}
document.addEventListener("click", (event) => {
  if (event.target.closest("a.in-chunk")) setTimeout(openChunk);
});
addEventListener("hashchange", openChunk);
openChunk();
document.documentElement.dataset.ready = "yes";
