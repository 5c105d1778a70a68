"use strict";
// Draws the map on a canvas. Coordinates of points are 0 to 65535; `zoom` is in pixels per unit, and the point in the
// middle of the canvas is at (atX, atY).

const canvas = $("#map"), pen = canvas.getContext("2d"), UNITS = 65535;
const shown = new Set(); // numbers of the modalities that are shown
let points = { ids: [], x: [], y: [], modalities: [], names: [], hits: [] };
let hits = new Set(), chosen = -1, zoom = 0, fitted = 0, atX = UNITS / 2, atY = UNITS / 2, asked = 0;

const fitting = () => (0.94 * Math.min(canvas.clientWidth, canvas.clientHeight)) / UNITS;
const screenX = (i) => (points.x[i] - atX) * zoom + canvas.clientWidth / 2;
const screenY = (i) => (points.y[i] - atY) * zoom + canvas.clientHeight / 2;

function draw() {
  const scale = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const space = Math.min(width, height) / Math.sqrt(points.x.length || 1); // pixels between points if they were evenly spaced
  const size = Math.min(14, Math.sqrt(zoom / fitting()) * Math.min(9, Math.max(3, 0.6 * space)));
  const colors = points.names.map((_, i) => getComputedStyle($(`[data-shown="${i}"] + .dot`)).backgroundColor);
  pen.globalAlpha = 0.75;
  points.names.forEach((_, modality) => {
    if (!shown.has(modality)) return;
    pen.fillStyle = colors[modality];
    for (let i = 0; i < points.x.length; i++) {
      if (points.modalities[i] !== modality) continue;
      const x = screenX(i), y = screenY(i);
      if (x > -9 && x < width + 9 && y > -9 && y < height + 9) pen.fillRect(x - size / 2, y - size / 2, size, size);
    }
  });
  pen.globalAlpha = 1;
  const ring = (i, radius, line, color) => {
    pen.strokeStyle = style.getPropertyValue(color);
    pen.lineWidth = line;
    pen.beginPath();
    pen.arc(screenX(i), screenY(i), radius, 0, 2 * Math.PI);
    pen.stroke();
  };
  for (const i of hits) if (shown.has(points.modalities[i])) ring(i, size / 2 + 4, 1.5, "--soft");
  if (chosen >= 0) {
    // Upon a disc that hides its neighbors, and in a color that no ring of a result has.
    ring(chosen, 9, 18, "--card");
    ring(chosen, 18, 4, "--accent");
    pen.fillStyle = colors[points.modalities[chosen]];
    pen.fillRect(screenX(chosen) - 7, screenY(chosen) - 7, 14, 14);
  }
}

// Zooms by a factor around a place on the screen; factor 0 shows everything.
function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const before = zoom;
  zoom = factor ? Math.min(400 * fitting(), Math.max(fitting() / 2, zoom * factor)) : fitting();
  if (factor) {
    atX += (x - canvas.clientWidth / 2) * (1 / before - 1 / zoom);
    atY += (y - canvas.clientHeight / 2) * (1 / before - 1 / zoom);
  } else atX = atY = UNITS / 2;
  draw();
}

// The shown point with the least cost(dx, dy) in pixels from a place; -1 if all costs are infinite.
function cheapest(x, y, cost) {
  let best = -1, least = Infinity;
  for (let i = 0; i < points.x.length; i++) {
    if (!shown.has(points.modalities[i]) || i === chosen) continue;
    const price = cost(screenX(i) - x, screenY(i) - y);
    if (price < least) [best, least] = [i, price];
  }
  return best;
}

async function choose(i) {
  chosen = i;
  const x = screenX(i), y = screenY(i);
  if (x < 0 || y < 0 || x > canvas.clientWidth || y > canvas.clientHeight) [atX, atY] = [points.x[i], points.y[i]];
  draw();
  const own = ++asked;
  try {
    const answer = await ask(`/items/${points.ids[i]}`);
    const text = await answer.text();
    if (own !== asked) return;
    if (!answer.ok) throw new Error(text);
    $("#results").replaceChildren(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
    explain();
  } catch (error) {
    explain(error.message);
  }
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return; // The browser's own zoom and history.
  const step = STEPS[event.key];
  if (step) {
    const x = chosen < 0 ? canvas.clientWidth / 2 : screenX(chosen), y = chosen < 0 ? canvas.clientHeight / 2 : screenY(chosen);
    // A step sideways costs more than a step ahead.
    const next = cheapest(x, y, (dx, dy) => {
      const ahead = dx * step[0] + dy * step[1], aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
      return chosen < 0 ? Math.hypot(dx, dy) : ahead > 0 && aside <= 2 * ahead ? ahead + 2 * aside : Infinity;
    });
    if (next >= 0) choose(next);
  } else if (event.key === "+" || event.key === "=") zoomBy(1.6);
  else if (event.key === "-") zoomBy(1 / 1.6);
  else if (event.key === "0") zoomBy(0);
  else if (event.key === "Enter" && chosen >= 0) $("#results").focus();
  else return;
  event.preventDefault();
});

const fingers = new Map(); // positions of the pointers that are down
let moved = 0;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  if (fingers.size === 1) moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const dx = event.offsetX - before[0], dy = event.offsetY - before[1];
  const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
  moved += Math.abs(dx) + Math.abs(dy);
  fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  atX -= dx / zoom / fingers.size;
  atY -= dy / zoom / fingers.size;
  const distance = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]) || 1;
  if (other) zoomBy(distance([event.offsetX, event.offsetY]) / distance(before), (event.offsetX + other[0]) / 2, (event.offsetY + other[1]) / 2);
  else draw();
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (!fingers.delete(event.pointerId) || name === "pointercancel" || moved > 8) return;
    const reach = event.pointerType === "mouse" ? 12 : 28; // pixels
    const next = cheapest(event.offsetX, event.offsetY, (dx, dy) => (Math.hypot(dx, dy) < reach ? Math.hypot(dx, dy) : Infinity));
    if (next >= 0) choose(next);
  });
}
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
}, { passive: false });
for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoomBy(Number(button.dataset.zoom)));
for (const box of document.querySelectorAll("[data-shown]")) {
  shown.add(Number(box.dataset.shown));
  box.addEventListener("change", () => {
    box.checked ? shown.add(Number(box.dataset.shown)) : shown.delete(Number(box.dataset.shown));
    draw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => {
  zoom *= fitting() / (fitted || fitting()); // The same part of the map, in the new size.
  fitted = fitting();
  draw();
}).observe(canvas);

(async () => {
  try {
    const answer = await ask(canvas.dataset.points);
    if (!answer.ok) throw new Error(await answer.text());
    points = await answer.json();
    const found = new Set(points.hits);
    hits = new Set(points.ids.flatMap((id, i) => (found.has(id) ? [i] : [])));
    canvas.dataset.ready = points.ids.length;
    zoomBy(0);
  } catch (error) {
    explain(error.message);
  }
})();
