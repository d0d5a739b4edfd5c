// The painting that an image starts from: colours, fill and eraser over an image or white paper, and a mask over all of it.

import { drawLine, PAPER, Sheet } from "./canvas.js";

const MASK = "#d946ef"; // as it is shown
const MASK_OPACITY = 0.6;
const LIKE = 24; // of 255: how far a colour may be from that under the pointer for the fill to go on

export class Painting extends Sheet {
  /** The layers from below: an image or paper, the strokes on it, and the mask. */
  get layers() {
    this.made ??= { ground: layer(), paint: layer(), mask: layer() };
    return this.made;
  }

  get hasMask() {
    return this.strokes.some(({ kind }) => kind === "mask");
  }

  /** Start from an image, which is cropped to the sheet. */
  setImage(bitmap) {
    this.put({ kind: "image", bitmap, points: [{}] });
    this.changeAll();
  }

  wipe() {
    const { width, height } = this.canvas;
    for (const { canvas } of Object.values(this.layers)) Object.assign(canvas, { width, height }); // which clears them
    this.cover();
  }

  /** Begin anew with an image, or with paper. */
  cover(bitmap) {
    const { ground } = this.layers;
    const { width, height } = this.canvas;
    ground.fillStyle = PAPER;
    ground.fillRect(0, 0, width, height);
    if (bitmap) drawCropped(ground, bitmap, bitmap.width, bitmap.height);
  }

  drawEnd(stroke, i) {
    const { paint, mask } = this.layers;
    if (stroke.kind === "image") {
      for (const { canvas } of [paint, mask]) canvas.width = this.canvas.width; // clears it
      this.cover(stroke.bitmap);
    } else if (stroke.kind === "fill") {
      if (i === 0) fill(paint, this.flat(), stroke.points[0], stroke.colour);
    } else if (stroke.kind === "eraser") {
      for (const context of [paint, mask]) erase(context, stroke, i);
    } else if (stroke.kind === "mask") drawLine(mask, stroke, i, MASK);
    else drawLine(paint, stroke, i, stroke.colour);
  }

  show() {
    const { context } = this;
    context.drawImage(this.layers.ground.canvas, 0, 0);
    context.drawImage(this.layers.paint.canvas, 0, 0);
    context.globalAlpha = MASK_OPACITY;
    context.drawImage(this.layers.mask.canvas, 0, 0);
    context.globalAlpha = 1;
  }

  /** The painting without its mask, on a canvas of its own. */
  flat() {
    const { ground, paint } = this.layers;
    const flat = layer(ground.canvas);
    flat.drawImage(ground.canvas, 0, 0);
    flat.drawImage(paint.canvas, 0, 0);
    return flat.canvas;
  }

  /** The mask as a PNG in a data: URL, white on black. */
  maskPng() {
    const { canvas } = this.layers.mask;
    const mask = layer(canvas);
    mask.drawImage(canvas, 0, 0);
    mask.globalCompositeOperation = "source-in";
    mask.fillStyle = "#fff";
    mask.fillRect(0, 0, canvas.width, canvas.height);
    mask.globalCompositeOperation = "destination-over";
    mask.fillStyle = "#000";
    mask.fillRect(0, 0, canvas.width, canvas.height);
    return mask.canvas.toDataURL("image/png");
  }
}

/** The drawing context of a new canvas. */
export function layer({ width, height } = { width: 1, height: 1 }) {
  return Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
}

/** Draw the middle of an image over all of a canvas. */
export function drawCropped(context, image, width, height) {
  const { canvas } = context;
  const scale = Math.max(canvas.width / width, canvas.height / height);
  const [across, down] = [width * scale, height * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (canvas.width - across) / 2, (canvas.height - down) / 2, across, down);
}

function erase(context, stroke, i) {
  context.globalCompositeOperation = "destination-out";
  drawLine(context, stroke, i, "#000");
  context.globalCompositeOperation = "source-over";
}

/** Fill the area of one colour around a point, as `seen` shows it, on another canvas of the same size. */
function fill(context, seen, point, colour) {
  const { width, height } = seen;
  const colours = seen.getContext("2d").getImageData(0, 0, width, height).data;
  const image = context.getImageData(0, 0, width, height);
  const [x, y] = [Math.min(Math.max(Math.floor(point.x), 0), width - 1), Math.min(Math.max(Math.floor(point.y), 0), height - 1)];
  const start = y * width + x;
  const first = colours.slice(4 * start, 4 * start + 3);
  const isLike = (i) => [0, 1, 2].every((part) => Math.abs(colours[4 * i + part] - first[part]) <= LIKE);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const reached = new Uint8Array(width * height);
  const waiting = [start];
  reached[start] = 1;
  while (waiting.length) {
    const i = waiting.pop();
    image.data.set([red, green, blue, 255], 4 * i);
    const column = i % width;
    for (const next of [column > 0 && i - 1, column < width - 1 && i + 1, i - width, i + width]) {
      if (next === false || next < 0 || next >= reached.length || reached[next] || !isLike(next)) continue;
      reached[next] = 1;
      waiting.push(next);
    }
  }
  context.putImageData(image, 0, 0);
}
