// A sheet of paper: dark strokes on white, with an eraser and undo.

const INK = "#000";
const PAPER = "#fff";

export class Sheet {
  /** `onChange` is called after every piece of a stroke. */
  constructor(canvas, { brush, eraser, onChange }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.brush = brush;
    this.eraser = eraser;
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
    const side = 512;
    const longest = Math.max(width, height);
    this.canvas.width = Math.round((side * width) / longest);
    this.canvas.height = Math.round((side * height) / longest);
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
    this.stroke = { erases: this.eraser.checked, points: [] };
    this.strokes.push(this.stroke);
    this.canvas.parentElement.classList.remove("empty");
    this.add(x, y, pressure);
  }

  add(x, y, pressure = 1) {
    this.stroke.points.push({ x, y, width: Number(this.brush.value) * pressure });
    this.drawEnd(this.stroke, this.stroke.points.length - 1);
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
    this.end();
    this.redraw();
    this.onChange();
  }

  clear() {
    this.strokes = [];
    this.end();
    this.redraw();
    this.onChange();
  }

  redraw() {
    this.context.fillStyle = PAPER;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.canvas.parentElement.classList.toggle("empty", this.isEmpty);
    for (const stroke of this.strokes) stroke.points.forEach((_, i) => this.drawEnd(stroke, i));
  }

  /** The line from the point before point `i` to it; a dot at the first. */
  drawEnd(stroke, i) {
    const [from, to] = [stroke.points[Math.max(i - 1, 0)], stroke.points[i]];
    const { context } = this;
    context.strokeStyle = stroke.erases ? PAPER : INK;
    context.lineWidth = to.width;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
  }

  /** The user's drawing as a PNG in a data: URL. */
  png() {
    return this.canvas.toDataURL("image/png");
  }
}

/** The pressure of a pen that measures it; 1 for a mouse or a finger. */
function pressureOf({ pointerType, pressure }) {
  return pointerType === "pen" && pressure > 0 ? 0.4 + pressure : 1;
}
