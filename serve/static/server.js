// HTTP requests to the service: its models, images as files, and the token that both need.

const TOKEN = "hypersd-token"; // in sessionStorage: gone with the tab, and never in an address
const PATIENCE = 10_000; // milliseconds

export class Unauthorized extends Error {}

export const token = () => sessionStorage.getItem(TOKEN);
export const keepToken = (text) => sessionStorage.setItem(TOKEN, text);

/** The models that GET /v1/models lists. Throws Unauthorized if the token is missing or wrong. */
export async function askModels() {
  const answer = await ask("/v1/models", { headers: authorization(), signal: AbortSignal.timeout(PATIENCE) });
  return (await answer.json()).data;
}

/** Generate one image, as a PNG file that carries its settings. */
export async function generateFile(request) {
  const headers = { "Content-Type": "application/json", Accept: "image/png", ...authorization() };
  const answer = await ask("/v1/images/generations", { method: "POST", headers, body: JSON.stringify(request) });
  return answer.blob();
}

async function ask(path, options) {
  const answer = await fetch(path, options).catch(() => {
    throw new Error("The server does not answer.");
  });
  if (answer.status === 401) throw new Unauthorized();
  if (!answer.ok) throw new Error(await problemOf(answer));
  return answer;
}

async function problemOf(answer) {
  const body = await answer.json().catch(() => null); // a proxy in front of the server answers in HTML
  return body?.error?.message ?? `The server answers ${answer.status}.`;
}

function authorization() {
  return token() ? { Authorization: `Bearer ${token()}` } : {};
}
