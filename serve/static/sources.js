// What generation starts from: the text alone, a painting, or a camera.

import { Camera, cameras } from "./camera.js";
import { Painting } from "./painting.js";
import { Pen } from "./pen.js";
import { field } from "./settings.js";

const QUALITY = 0.9; // of JPEGs
const NO_ENCODER = "This bundle cannot start from an image: export it again without --text-only.";

export class Sources {
  /** `onChange` is called when the image would change, `onFrame` for every frame of the camera, `complain` with errors. */
  constructor({ onChange, onFrame, complain }) {
    this.onChange = onChange;
    this.complain = complain;
    this.size = { width: 512, height: 512 };
    this.painting = new Painting(field("painting"), { tool, onChange });
    new Pen(this.painting, field("painting-pen"));
    this.camera = new Camera(field("video"), { onFrame: () => this.isPaused || onFrame(), onGone: (why) => this.lose(why) });
    field("sources").addEventListener("change", ({ target }) => target.name === "sources" && this.choose(target.value));
    field("device").addEventListener("change", () => this.watch(field("device").value));
    field("pause").addEventListener("click", () => this.pause(!this.isPaused));
    field("take").addEventListener("click", () => this.paintOn(this.camera.frame(this.size.width, this.size.height)));
    field("painting-undo").addEventListener("click", () => this.painting.undo());
    field("painting-clear").addEventListener("click", () => this.painting.clear());
    field("colour").addEventListener("input", () => checked("colours", "own"));
    field("open").addEventListener("click", () => field("file").click());
    field("file").addEventListener("change", () => this.open(field("file").files));
    this.takeFiles();
  }

  get name() {
    return field("sources").querySelector(":checked").value;
  }

  /** Follow a checkpoint: whether it can start from an image, and the size of its images. */
  offer({ has_encoder: hasEncoder, width, height }) {
    this.hasEncoder = hasEncoder;
    this.size = { width: width.default, height: height.default };
    field("sources").hidden = !hasEncoder;
    this.painting.setAspect(width.default, height.default);
    field("video").style.setProperty("--aspect", width.default / height.default);
    if (!hasEncoder && this.name !== "text") this.choose("text");
  }

  choose(name) {
    checked("sources", name);
    document.body.dataset.source = name;
    field("paint-source").hidden = name !== "paint";
    field("camera-source").hidden = name !== "camera";
    field("strength-field").hidden = name === "text";
    this.camera.stop();
    this.pause(false);
    this.complain("");
    if (name === "camera") this.watch();
    this.onChange();
  }

  /** Show a camera's frames. */
  async watch(deviceId) {
    field("video").parentElement.classList.add("empty");
    field("camera-error").textContent = "";
    try {
      await this.camera.start(deviceId);
    } catch (error) {
      if (this.name === "camera") this.lose(error.message);
      return;
    }
    if (!this.camera.stream) return; // another source was chosen meanwhile
    field("video").parentElement.classList.remove("empty");
    const found = await cameras();
    field("device").replaceChildren(...found.map(({ label, deviceId: id }, i) => new Option(label || `Camera ${i + 1}`, id)));
    field("device").value = this.camera.deviceId;
    field("device-field").hidden = found.length < 2;
  }

  lose(why) {
    field("video").parentElement.classList.add("empty");
    field("camera-error").textContent = why;
  }

  pause(isPaused) {
    this.isPaused = isPaused;
    field("pause").textContent = isPaused ? "Go on" : "Pause";
    field("pause").setAttribute("aria-pressed", isPaused);
    if (isPaused) field("video").pause();
    else if (this.camera.stream) field("video").play();
  }

  /** Start from an image: it becomes the ground of the painting. */
  paintOn(bitmap) {
    this.painting.setImage(bitmap);
    this.choose("paint");
  }

  async open(files) {
    const [file] = files;
    field("file").value = ""; // so that the same file can be chosen again
    if (!file) return;
    if (!this.hasEncoder) return this.complain(NO_ENCODER);
    try {
      this.paintOn(await createImageBitmap(file, { imageOrientation: "from-image" }));
    } catch {
      this.complain(`${file.name || "That"} is not an image that this browser can open: take a PNG, JPEG or WebP file.`);
    }
  }

  /** Open files that are dropped on the page or pasted. */
  takeFiles() {
    const hasFiles = ({ dataTransfer }) => dataTransfer.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || document.body.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("dropping");
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.open(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.open(event.clipboardData.files);
    });
  }

  /** The init image as it is now: fields of the request and a JPEG file; null if there is none. */
  async image() {
    const strength = field("strength").valueAsNumber;
    if (this.name === "camera" && this.camera.stream) {
      return { fields: { strength }, file: await jpeg(this.camera.frame(this.size.width, this.size.height)) };
    }
    if (this.name !== "paint" || this.painting.isEmpty) return null;
    const fields = this.painting.hasMask ? { strength, mask: this.painting.maskPng() } : { strength };
    return { fields, file: await jpeg(this.painting.flat()) };
  }
}

function tool() {
  const kind = field("tools").querySelector(":checked").value;
  const chosen = field("colours").querySelector(":checked").value;
  return { kind, width: Number(field("painting-brush").value), colour: chosen === "own" ? field("colour").value : chosen };
}

/** Check the radio button of that value in a group. */
function checked(group, value) {
  field(group).querySelector(`[value="${value}"]`).checked = true;
}

const jpeg = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
