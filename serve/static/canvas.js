// Something to draw on: strokes with a pointer or the keyboard's pen, and undo. By itself a sheet of paper: dark strokes on white.

const INK = "#000";
const SIDE = 512; // the longer one of a canvas, in pixels
export const PAPER = "#fff";

export class Sheet {
  /** `tool()` is a stroke's `{ kind, width, colour }`; `onChange` is called after every piece of one. */
  constructor(canvas, { tool, onChange }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.tool = tool;
    this.onChange = onChange;
    this.strokes = [];
    this.redraw();
    canvas.addEventListener("pointerdown", (event) => this.touch(event));
    canvas.addEventListener("pointermove", (event) => this.follow(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.end());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  get isEmpty() {
    return this.strokes.length === 0;
  }

  /** Give the sheet the image's aspect ratio; strokes stay as they are. */
  setAspect(width, height) {
    const longest = Math.max(width, height);
    this.canvas.width = Math.round((SIDE * width) / longest);
    this.canvas.height = Math.round((SIDE * height) / longest);
    this.redraw();
  }

  touch(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.begin(...this.place(event), pressureOf(event));
  }

  follow(event) {
    if (!this.stroke) return;
    const events = event.getCoalescedEvents?.() ?? []; // all that happened since the last frame
    for (const part of events.length ? events : [event]) this.add(...this.place(part), pressureOf(part));
  }

  /** An event's position on the sheet. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    const down = (event.clientY - box.top) / box.height;
    return [across * this.canvas.width, down * this.canvas.height];
  }

  begin(x, y, pressure = 1) {
    const { kind, colour } = this.tool();
    this.stroke = { kind, colour, points: [] };
    this.put(this.stroke);
    this.add(x, y, pressure);
  }

  put(stroke) {
    this.strokes.push(stroke);
    this.canvas.parentElement.classList.remove("empty");
  }

  add(x, y, pressure = 1) {
    this.stroke.points.push({ x, y, width: this.tool().width * pressure });
    this.drawEnd(this.stroke, this.stroke.points.length - 1);
    this.show();
    this.onChange();
  }

  end() {
    this.stroke = null;
  }

  key(event) {
    if (event.key === "Delete" || event.key === "Backspace") this.clear();
    else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else return;
    event.preventDefault();
  }

  undo() {
    this.strokes.pop();
    this.changeAll();
  }

  clear() {
    this.strokes = [];
    this.changeAll();
  }

  changeAll() {
    this.end();
    this.redraw();
    this.onChange();
  }

  redraw() {
    this.wipe();
    this.canvas.parentElement.classList.toggle("empty", this.isEmpty);
    for (const stroke of this.strokes) stroke.points.forEach((_, i) => this.drawEnd(stroke, i));
    this.show();
  }

  /** Bring what was drawn onto the canvas; here it is drawn there at once. */
  show() {}

  wipe() {
    this.context.fillStyle = PAPER;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  drawEnd(stroke, i) {
    drawLine(this.context, stroke, i, stroke.kind === "eraser" ? PAPER : INK);
  }

  /** The user's drawing as a PNG in a data: URL. */
  png() {
    return this.canvas.toDataURL("image/png");
  }
}

/** The line from the point before point `i` of a stroke to it; a dot at the first. */
export function drawLine(context, { points }, i, colour) {
  const [from, to] = [points[Math.max(i - 1, 0)], points[i]];
  context.beginPath();
  if (i === 0) {
    context.fillStyle = colour;
    context.arc(to.x, to.y, to.width / 2, 0, 2 * Math.PI);
    return context.fill(); // a line without length would be nothing
  }
  context.strokeStyle = colour;
  context.lineWidth = to.width;
  context.lineCap = "round";
  context.moveTo(from.x, from.y);
  context.lineTo(to.x, to.y);
  context.stroke();
}

/** The pressure of a pen that measures it; 1 for a mouse or a finger. */
function pressureOf({ pointerType, pressure }) {
  return pointerType === "pen" && pressure > 0 ? 0.4 + pressure : 1;
}
