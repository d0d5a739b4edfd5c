// The live page: type, draw, paint or stand before the camera, and the image follows.

import { offerAdapters } from "./adapters.js";
import { Sheet } from "./canvas.js";
import { Pen } from "./pen.js";
import { noteDropped, saveImages, showImage } from "./images.js";
import { askModels, keepToken, token, Unauthorized } from "./server.js";
import { body, bringBack, chooseControlNet, field, fieldOf, keep, offer, showExamples, showNumbers, throwDice } from "./settings.js";
import { LiveSocket } from "./socket.js";
import { Sources } from "./sources.js";

const LARGE = 640 * 640; // pixels from which on JPEG is quicker than PNG
const RETRY = 1000; // milliseconds
const PASSING = ["not_ready", "queue_full", "stopping"]; // codes of rejections after which the same input is worth another attempt
const REFRESH = 2000; // milliseconds between two looks for new LoRAs
const UNDER_WAY = 2; // frames of the camera: one that is generated, and one that then can begin at once

const inputs = new Map(); // unanswered ones by id: the request, the file of its init image, and the time of asking
let models = [];
let number = 0; // of the next input
let frame = 0;
let countdown = 0;
let resting = 0; // until when no frame of the camera is sent, after an error

const sheet = new Sheet(field("canvas"), { tool, onChange: changed });
new Pen(sheet, field("pen"));
const sources = new Sources({ onChange: sourceChanged, onFrame: frameArrived, complain });
const socket = new LiveSocket({ prepare, token, onOpen: opened, onClosed: closed, onImage: show, onError: reject });

field("model").addEventListener("change", () => choose(field("model").value));
field("controlnet").addEventListener("change", () => chooseControlNet(current()));
field("seed").addEventListener("input", () => (field("keep-seed").checked = true));
field("controls").addEventListener("input", ({ target }) => (target.closest(".tool") ? showNumbers() : changed()));
field("controls").addEventListener("submit", (event) => event.preventDefault());
field("dice").addEventListener("click", dice);
field("undo").addEventListener("click", () => sheet.undo());
field("clear").addEventListener("click", () => sheet.clear());
field("save").addEventListener("click", save);
field("retry").addEventListener("click", () => socket.tryNow());
field("token-form").addEventListener("submit", withToken);
window.addEventListener("online", () => socket.tryNow());
window.addEventListener("hashchange", fromAddress);
document.addEventListener("keydown", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  if (event.key === "Enter") dice();
  else if (event.key.toLowerCase() === "s") save();
  else return;
  event.preventDefault();
});
setInterval(refresh, REFRESH);
socket.tryNow();

/** Ask for the models before every connection: a restarted server may serve others. */
async function prepare() {
  try {
    const served = await askModels();
    if (JSON.stringify(served) !== JSON.stringify(models)) fill(served);
    return true;
  } catch (error) {
    if (!(error instanceof Unauthorized)) throw error;
    askForToken();
    return false;
  }
}

/** Follow the LoRAs that the service has found and lost. */
async function refresh() {
  if (document.hidden || !socket.isOpen || current()?.lora_rank == null) return;
  const served = await askModels().catch(() => []); // the socket tells of a server that has gone
  for (const { id, adapters } of served) Object.assign(models.find((model) => model.id === id) ?? {}, { adapters });
  if (offerAdapters(current().adapters)) changed();
}

function fill(served) {
  models = served;
  field("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  field("model-field").hidden = models.length < 2;
  showExamples(models[0], changed);
  fromAddress();
}

/** Fill the form from the page's address. */
function fromAddress() {
  if (!models.length) return; // they bring the form back when they come
  const kept = bringBack();
  choose(models.some(({ id }) => id === kept.model) ? kept.model : models[0].id, kept);
}

function choose(id, kept) {
  field("model").value = id;
  offer(current());
  kept?.others();
  sheet.setAspect(current().width.default, current().height.default);
  sources.offer(current());
  sourceChanged();
}

/** The pen of the drawing for a ControlNet. */
function tool() {
  return { kind: field("eraser").checked ? "eraser" : "pen", width: Number(field("brush").value) };
}

/** A ControlNet is drawn for beside the text alone: a painting or the camera takes the place of its sheet. */
function sourceChanged() {
  field("drawing").hidden = sources.name !== "text" || !current()?.controlnets.length;
  if (sources.name !== "camera") changed(); // its frames ask by themselves
}

/** Send a frame of the camera, unless the service has enough to do with earlier ones. */
function frameArrived() {
  if (inputs.size < UNDER_WAY && performance.now() > resting) changed();
  else noteDropped();
}

const current = () => models.find(({ id }) => id === field("model").value);

/** Send the form as the newest input, at most once a frame, however many events there were. */
function changed() {
  showNumbers();
  if (!models.length) return;
  document.body.dataset.asked = ""; // equal to `shown` once the image of the newest input is there
  document.body.classList.toggle("busy", sources.name !== "camera"); // which would be so all the time
  if (frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    if (!field("keep-seed").checked) throwDice();
    keep();
    socket.send(input);
  });
}

async function input() {
  const request = { ...body(sheet), id: number };
  const { width, height } = current();
  request.output_format = width.default * height.default >= LARGE ? "jpeg" : "png";
  const asked = { request, sent: performance.now() };
  inputs.set(number, asked);
  document.body.dataset.asked = number;
  number += 1;
  const image = await sources.image();
  if (image) {
    Object.assign(request, image.fields);
    asked.file = image.file;
  }
  return asked;
}

function opened() {
  clearInterval(countdown);
  document.body.classList.remove("offline");
  field("retry").hidden = true;
  field("wait").textContent = "";
  status("Connected");
  changed();
}

/** Show why the connection is lost, and count down to the next attempt; screen readers skip the countdown. */
function closed(seconds, why) {
  inputs.clear(); // their images will never arrive
  document.body.classList.add("offline");
  document.body.classList.remove("busy");
  field("retry").hidden = false;
  status(why || "The server does not answer.");
  const next = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.max(1, Math.ceil((next - performance.now()) / 1000));
    field("wait").textContent = `Trying again in ${left} s.`;
  };
  clearInterval(countdown);
  countdown = setInterval(tick, 250);
  tick();
}

function status(message) {
  if (field("status").textContent !== message) field("status").textContent = message; // setting it anew would make screen readers repeat it
}

function show(header, image) {
  const asked = inputs.get(header.id);
  if (!asked) return;
  for (const id of inputs.keys()) if (id < header.id && inputs.delete(id)) noteDropped(); // superseded
  complain("");
  showImage(header, image, asked, (performance.now() - asked.sent) / 1000);
  if (header.index === header.count - 1) {
    inputs.delete(header.id);
    document.body.dataset.shown = header.id;
  }
  if (document.body.dataset.shown === document.body.dataset.asked) document.body.classList.remove("busy");
}

/** Show an input's error beside its field; the last image stays. */
function reject(id, error) {
  for (const earlier of inputs.keys()) if (id === null || earlier <= id) inputs.delete(earlier);
  resting = performance.now() + RETRY;
  if (id !== null && id !== number - 1) return; // a newer input is on its way
  complain(error.message, fieldOf(error));
  if (PASSING.includes(error.code)) setTimeout(changed, RETRY);
  else document.body.classList.remove("busy");
}

function complain(message, at = field("prompt")) {
  const error = field("error");
  document.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
  if (message) {
    (at.closest("label") ?? at).after(error);
    at.setAttribute("aria-invalid", "true");
    at.setAttribute("aria-describedby", "error");
  }
  if (error.textContent !== message) error.textContent = message;
}

function dice() {
  throwDice();
  changed();
}

async function save() {
  field("save").disabled = true;
  try {
    await saveImages();
    complain("");
  } catch (error) {
    complain(`Not saved: ${error instanceof Unauthorized ? "the token is not valid any more." : error.message}`, field("save"));
  } finally {
    field("save").disabled = false;
  }
}

function askForToken() {
  clearInterval(countdown);
  field("wait").textContent = "";
  status(token() ? "The token is wrong." : "The server asks for a token.");
  field("token-form").hidden = false;
  field("token").focus();
}

function withToken(event) {
  event.preventDefault();
  keepToken(field("token").value.trim());
  field("token-form").hidden = true;
  socket.tryNow();
}
