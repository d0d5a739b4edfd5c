// The LoRAs that the service offers: a slider for each, which is off at first.

const PREFIX = "adapter."; // of their names in the page's address

const list = document.getElementById("adapters");
const sliders = new Map(); // by the LoRA's name
let made = 0;

/** Offer these LoRAs; sliders that are there stay as they are. Returns whether one that was on has gone. */
export function offerAdapters(adapters) {
  const names = adapters.map(({ name }) => name);
  const gone = [...sliders.keys()].filter((name) => !names.includes(name));
  const changes = gone.some((name) => name in strengths());
  for (const name of gone) {
    sliders.get(name).parentElement.remove();
    sliders.delete(name);
  }
  adapters.forEach((adapter, i) => {
    if (!sliders.has(adapter.name)) list.insertBefore(row(adapter), list.children[i + 1] ?? null); // after the legend
    sliders.get(adapter.name).parentElement.title = adapter.notes.join("\n");
  });
  list.hidden = !adapters.length;
  return changes;
}

/** The strengths of those that are on, by name. */
export function strengths() {
  return Object.fromEntries([...sliders].map(([name, slider]) => [name, slider.valueAsNumber]).filter(([, value]) => value));
}

/** The same for the page's address. */
export const keptStrengths = () => Object.entries(strengths()).map(([name, value]) => [PREFIX + name, value]);

/** Bring back the strengths of an address. */
export function bringStrengthsBack(kept) {
  for (const [name, slider] of sliders) set(slider, kept.get(PREFIX + name) ?? 0);
}

function row({ name }) {
  const id = `adapter-${(made += 1)}`;
  const slider = Object.assign(document.createElement("input"), { id, type: "range", min: -1, max: 2, step: 0.05 });
  const label = Object.assign(document.createElement("label"), { htmlFor: id });
  const words = Object.assign(document.createElement("span"), { textContent: name });
  const output = document.createElement("output");
  output.htmlFor.add(id);
  label.append(words, output, slider);
  slider.addEventListener("input", () => show(slider));
  sliders.set(name, slider);
  set(slider, 0);
  return label;
}

function set(slider, value) {
  slider.value = value;
  show(slider);
}

function show(slider) {
  slider.previousElementSibling.value = slider.valueAsNumber ? slider.valueAsNumber.toFixed(2) : "off";
}
