// The form: its values as a request's body, and in the page's address.

import { bringStrengthsBack, keptStrengths, offerAdapters, strengths } from "./adapters.js";

const KEPT = ["model", "prompt", "steps", "seed", "count", "eta", "guidance", "size", "controlnet", "control-scale", "strength"];
const LARGEST_SEED = 2 ** 32; // bound of random seeds
const SIZES = [512, 640, 768, 896, 1024, 1152, 1280, 1536];

const EXAMPLES = ["a photo of a cat", "a lighthouse in a storm, oil painting", "a bowl of ramen, studio light"];
// The demonstration checkpoints know only shapes.
const DEMO = ["a large yellow star on green stripes", "a red circle left of a blue square", "a purple ring on a pink background"];
// The form's fields by the names that the service's errors use.
const FIELDS = {
  n: "count",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  width: "size",
  height: "size",
  adapter: "adapters",
  control_image: "canvas",
  control_scale: "control-scale",
  controlnet_conditioning_scale: "control-scale",
  keep_steps: "strength",
  image: "sources",
  mask: "sources",
};
const KEEPING = 500; // milliseconds: browsers reject more frequent changes of the address

let keeping = 0;

export const field = (name) => document.getElementById(name);

/** The field that an error names, else the prompt's. */
export function fieldOf({ param, message }) {
  const name = /^\w*/.exec(param ?? message)[0];
  const known = field(FIELDS[name] ?? name)?.closest(".prompt, .panel > :not([hidden]), .settings > :not([hidden])");
  return known ? field(FIELDS[name] ?? name) : field("prompt");
}

/** Fill the form for a checkpoint; fields that it does not support are hidden. */
export function offer(model) {
  options(field("steps"), model.steps.allowed, model.steps.default);
  field("eta").value = model.eta.default;
  field("guidance").value = model.guidance_scale.default;
  field("guidance-field").hidden = model.guidance_scale.default <= 1;
  field("count").max = model.max_count;
  const sizes = sizesOf(model);
  options(field("size"), sizes, `${model.width.default}x${model.height.default}`);
  field("size-field").hidden = sizes.length < 2;
  const nets = model.controlnets;
  options(field("controlnet"), nets.map((net) => net.name), nets[0]?.name);
  field("controlnet-field").hidden = nets.length < 2;
  if (nets.length) chooseControlNet(model);
  offerAdapters(model.adapters);
  showNumbers();
}

export function chooseControlNet({ controlnets }) {
  const net = controlnets.find(({ name }) => name === field("controlnet").value);
  field("control-scale").value = net.control_scale;
}

/** Offer example prompts; the first one fills an empty prompt. */
export function showExamples({ checkpoint }, onChange) {
  const prompts = checkpoint.includes("Demo") ? DEMO : EXAMPLES;
  const buttons = prompts.map((prompt) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
    button.addEventListener("click", () => {
      field("prompt").value = prompt;
      onChange();
    });
    return button;
  });
  field("examples").replaceChildren(...buttons);
  if (!field("prompt").value) field("prompt").value = prompts[0];
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
  select.value = chosen ?? "";
}

/** The default size, and the square sizes that the checkpoint supports. */
function sizesOf({ width, height }) {
  const squares = SIZES.filter((side) => [width, height].every((of) => of.min <= side && side <= of.max));
  return [...new Set([`${width.default}x${height.default}`, ...squares.map((side) => `${side}x${side}`)])];
}

/** Show the sliders' values as numbers. */
export function showNumbers() {
  for (const name of ["eta", "guidance", "control-scale", "brush", "painting-brush", "strength"]) field(`${name}-value`).value = field(name).value;
}

/** The form as a request's body, with the drawing for a ControlNet if there is one. Invalid numbers are left for the service to reject. */
export function body(sheet) {
  const request = {
    model: field("model").value,
    prompt: field("prompt").value,
    n: field("count").valueAsNumber,
    steps: Number(field("steps").value),
    seed: field("seed").valueAsNumber,
    eta: field("eta").valueAsNumber,
  };
  if (!field("size-field").hidden) request.size = field("size").value;
  if (!field("guidance-field").hidden) request.guidance_scale = field("guidance").valueAsNumber;
  const adapters = strengths();
  if (Object.keys(adapters).length) request.adapters = adapters;
  if (!field("drawing").hidden && !sheet.isEmpty) {
    request.control_image = { [field("controlnet").value]: sheet.png() };
    request.control_scale = field("control-scale").valueAsNumber;
  }
  return request;
}

export function throwDice() {
  field("seed").value = Math.floor(Math.random() * LARGEST_SEED);
}

/** Keep the form in the address, so that a reload or a link restores it. The drawing is not kept. */
export function keep() {
  keeping ||= setTimeout(() => {
    keeping = 0;
    const kept = `#${new URLSearchParams([...KEPT.map((name) => [name, field(name).value]), ...keptStrengths()])}`;
    if (location.hash !== kept) history.replaceState(null, "", kept);
  }, KEEPING);
}

/** The form's values from the address; `model` is applied first, because it decides the ranges of the others. */
export function bringBack() {
  const kept = new URLSearchParams(location.hash.slice(1));
  return {
    model: kept.get("model"),
    others() {
      for (const name of KEPT) {
        const element = field(name);
        const known = element.tagName !== "SELECT" || [...element.options].some((one) => one.value === kept.get(name));
        if (kept.has(name) && known) element.value = kept.get(name);
      }
      bringStrengthsBack(kept);
      showNumbers();
    },
  };
}
