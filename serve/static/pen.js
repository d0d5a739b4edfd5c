// A pen for the keyboard: arrow keys move it, Space sets it down and lifts it.

const STEP = 16; // of the sheet's pixels; a quarter of it with Shift
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Pen {
  constructor(sheet, mark) {
    this.sheet = sheet;
    this.mark = mark;
    this.at = { x: sheet.canvas.width / 2, y: sheet.canvas.height / 2 };
    this.isDown = false;
    sheet.canvas.addEventListener("keydown", (event) => this.key(event));
    sheet.canvas.addEventListener("blur", () => this.lift());
    sheet.canvas.addEventListener("pointerdown", () => this.lift());
  }

  key(event) {
    const move = MOVES[event.key];
    if (event.key === " ") this.toggle();
    else if (move) this.move(move, event.shiftKey ? STEP / 4 : STEP);
    else return;
    event.preventDefault();
    this.showMark();
  }

  move([x, y], step) {
    const { width, height } = this.sheet.canvas;
    this.at.x = Math.min(Math.max(this.at.x + x * step, 0), width);
    this.at.y = Math.min(Math.max(this.at.y + y * step, 0), height);
    if (this.isDown && this.sheet.stroke) this.sheet.add(this.at.x, this.at.y);
  }

  toggle() {
    if (this.isDown) return this.lift();
    this.isDown = true;
    this.sheet.begin(this.at.x, this.at.y);
  }

  lift() {
    if (this.isDown) this.sheet.end();
    this.isDown = false;
    this.mark.hidden = true;
  }

  showMark() {
    const { canvas } = this.sheet;
    this.mark.hidden = false;
    this.mark.classList.toggle("down", this.isDown);
    this.mark.style.left = `${canvas.offsetLeft + (this.at.x / canvas.width) * canvas.offsetWidth}px`;
    this.mark.style.top = `${canvas.offsetTop + (this.at.y / canvas.height) * canvas.offsetHeight}px`;
  }
}
