// The service over HTTP: what it serves, images as files, and the token for both.

const TOKEN = "hypersd-token"; // in sessionStorage: gone with the tab, and never in an address
const PATIENCE = 10_000; // milliseconds

export class Unauthorized extends Error {}

export const token = () => sessionStorage.getItem(TOKEN);
export const keepToken = (text) => sessionStorage.setItem(TOKEN, text);

/** What GET /v1/models lists. Throws Unauthorized if it wants a token, or another one. */
export async function askModels() {
  const answer = await ask("/v1/models", { headers: authorization(), signal: AbortSignal.timeout(PATIENCE) });
  return (await answer.json()).data;
}

/** The image that a request asks for, as a PNG file that carries its settings. */
export async function drawFile(request) {
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
  const body = await answer.json().catch(() => null); // a proxy before the server says it in HTML
  return body?.error?.message ?? `The server answers ${answer.status}.`;
}

function authorization() {
  return token() ? { Authorization: `Bearer ${token()}` } : {};
}
