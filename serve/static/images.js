// Shows the images and the figures below them; saves them.

import { generateFile } from "./server.js";
import { field } from "./settings.js";

const WINDOW = 3000; // milliseconds over which images are counted
const SMALL = 256; // pixels: narrower images are enlarged so much that smoothing would leave only a blur

const arrivals = []; // times of images
const drops = []; // times of inputs and frames that were dropped for newer ones
let shown = null; // the request whose images are shown

setInterval(showRate, 500);

/** Replace the image at the header's index; the last image of an input also updates the figures. */
export function showImage(header, file, { request, file: start }, seconds) {
  shown = { ...request, seed: header.seed - header.index, start }; // without a seed in the form the service chooses one
  arrivals.push(performance.now());
  place(header, file);
  if (header.index === header.count - 1) showFigures(header, seconds);
  showRate();
}

function place(header, file) {
  const grid = field("images");
  grid.style.setProperty("--columns", Math.ceil(Math.sqrt(header.count)));
  while (grid.children.length > header.count) grid.lastChild.remove();
  while (grid.children.length <= header.index) grid.append(document.createElement("img"));
  const image = grid.children[header.index];
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = `${shown.prompt || "an image"}, seed ${header.seed}`;
  image.dataset.seed = header.seed;
  image.classList.toggle("small", header.width < SMALL);
}

function showFigures({ timings, waited, width, height, steps }, seconds) {
  const [all, generating, waiting] = [seconds, timings.total, waited].map((part) => Math.round(part * 1000));
  field("latency").textContent = `${all} ms: ${generating} generating, ${waiting} waiting`;
  field("shown-seed").textContent = `seed ${shown.seed}, ${width}x${height}, ${steps} ${steps === 1 ? "step" : "steps"}`;
}

/** Count an input or a frame of the camera that was dropped for a newer one. */
export function noteDropped() {
  drops.push(performance.now());
}

function showRate() {
  const [images, dropped] = [arrivals, drops].map(perSecond);
  field("rate").textContent = `${images} images/s`;
  field("dropped").textContent = drops.length ? `${dropped} dropped/s` : "";
}

function perSecond(times) {
  const since = performance.now() - WINDOW;
  while (times.length && times[0] < since) times.shift();
  return (times.length / (WINDOW / 1000)).toFixed(1);
}

/** Generate the shown images again as PNG files that carry their settings, and download them: equal seeds give equal pixels. */
export async function saveImages() {
  if (!shown) return;
  const { id, n, output_format, start, ...request } = shown;
  if (start) request.image = await dataUrl(start);
  for (let i = 0; i < n; i += 1) {
    const seed = request.seed + i;
    download(await generateFile({ ...request, seed }), `${request.model}-${seed}.png`);
  }
}

function dataUrl(file) {
  const reader = new FileReader();
  reader.readAsDataURL(file);
  return new Promise((resolve) => (reader.onload = () => resolve(reader.result)));
}

function download(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
