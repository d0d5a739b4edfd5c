// The images that are shown, and the figures below them.

import { drawFile } from "./server.js";
import { field } from "./settings.js";

const WINDOW = 3000; // milliseconds over which images are counted
const SMALL = 256; // pixels: narrower ones are enlarged so much that a blur would be all there is to see

const arrivals = []; // of images
let shown = null; // the request whose images they are

setInterval(showRate, 500);

/** Put an image where the one before it was; with an input's last one come the figures. */
export function showImage(header, image, request, seconds) {
  shown = { ...request, seed: header.seed - header.index }; // a form without a seed leaves it to the service
  arrivals.push(performance.now());
  place(header, image);
  if (header.index === header.count - 1) showFigures(header, seconds);
  showRate();
}

function place(header, image) {
  const grid = field("images");
  grid.style.setProperty("--columns", Math.ceil(Math.sqrt(header.count)));
  while (grid.children.length > header.count) grid.lastChild.remove();
  while (grid.children.length <= header.index) grid.append(document.createElement("img"));
  const image = grid.children[header.index];
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(image);
  image.alt = `${shown.prompt || "an image"}, seed ${header.seed}`;
  image.dataset.seed = header.seed;
  image.classList.toggle("small", header.width < SMALL);
}

function showFigures({ timings, waited, width, height, steps }, seconds) {
  const [all, drawing, waiting] = [seconds, timings.total, waited].map((part) => Math.round(part * 1000));
  field("latency").textContent = `${all} ms: ${drawing} drawing, ${waiting} waiting`;
  field("shown-seed").textContent = `seed ${shown.seed}, ${width}x${height}, ${steps} ${steps === 1 ? "step" : "steps"}`;
}

function showRate() {
  const now = performance.now();
  while (arrivals.length && arrivals[0] < now - WINDOW) arrivals.shift();
  field("rate").textContent = `${(arrivals.length / (WINDOW / 1000)).toFixed(1)} images/s`;
}

/** The images that are shown, drawn again as PNG files that carry their settings: the same seed, the same pixels. */
export async function saveImages() {
  if (!shown) return;
  const { id, n, output_format, ...request } = shown;
  for (let i = 0; i < n; i += 1) {
    const seed = request.seed + i;
    download(await drawFile({ ...request, seed }), `${request.model}-${seed}.png`);
  }
}

function download(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
