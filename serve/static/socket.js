// The connection to /v1/live. It sends the newest input only, and reconnects by itself.

const FIRST_WAIT = 250; // milliseconds until the first new attempt; each takes twice as long as the one before
const LONGEST_WAIT = 5000;
const UNSENT = 1 << 16; // bytes that may wait in the browser: beyond, a newer input takes the place of the next one

export class LiveSocket {
  /**
   * @param {{prepare: () => Promise<boolean>, token: () => string | null, onOpen: () => void,
   *   onClosed: (seconds: number, why: string) => void, onImage: (header: object, image: Blob) => void,
   *   onError: (id: number, error: object) => void}} handlers `prepare` is called before every attempt: if it throws,
   *   another attempt follows later; if it returns false, none follows before `tryNow`.
   */
  constructor(handlers) {
    this.handlers = handlers;
    this.pending = null; // makes the newest input, when there is room for it
    this.attempts = 0;
    this.isIdle = true; // neither connected nor connecting
  }

  async tryNow() {
    if (!this.isIdle) return;
    clearTimeout(this.timer);
    this.isIdle = false;
    try {
      if (await this.handlers.prepare()) this.connect();
      else this.isIdle = true;
    } catch (error) {
      this.again(error.message);
    }
  }

  connect() {
    const protocols = ["hypersd.live"];
    const token = this.handlers.token();
    if (token) protocols.push("bearer." + base64url(token)); // a browser sends no header with a WebSocket
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/v1/live`, protocols);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.attempts = 0;
      this.handlers.onOpen(); // sends the current input
    };
    socket.onmessage = (event) => this.receive(event.data);
    socket.onclose = (event) => this.again(event.reason);
    this.socket = socket;
  }

  /** Send the message that `make` promises; it is called when the input can go, or never if a newer one comes before. */
  send(make) {
    this.pending = make;
    this.flush();
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  async flush() {
    if (!this.pending || !this.isOpen || this.isMaking) return;
    // The server drops superseded inputs, so an input is sent at once, except on a slow line with unsent data.
    if (this.socket.bufferedAmount > UNSENT) {
      clearTimeout(this.flushing);
      this.flushing = setTimeout(() => this.flush(), 20);
      return;
    }
    const make = this.pending;
    this.pending = null;
    this.isMaking = true; // an image is compressed meanwhile
    const message = await make()
      .then(({ request, file }) => (file ? framed(request, file) : JSON.stringify(request)))
      .finally(() => (this.isMaking = false));
    if (this.isOpen) this.socket.send(message);
    this.flush();
  }

  receive(data) {
    if (typeof data === "string") {
      const { id, error } = JSON.parse(data);
      this.handlers.onError(id, error);
      return;
    }
    const length = new DataView(data).getUint32(0); // of the header; the image's file follows it
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    this.handlers.onImage(header, new Blob([new Uint8Array(data, 4 + length)], { type: header.mime }));
  }

  /** Try again after a wait that grows with each attempt, and is random so that pages do not all return at once. */
  again(why) {
    const wait = Math.min(FIRST_WAIT * 2 ** this.attempts, LONGEST_WAIT) * (0.8 + 0.4 * Math.random());
    this.attempts += 1;
    this.isIdle = true;
    this.handlers.onClosed(wait / 1000, why);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.tryNow(), wait);
  }
}

/** A binary message: the request's length (4 bytes), the request (JSON), and the file of its init image. */
async function framed(request, file) {
  const header = new TextEncoder().encode(JSON.stringify(request));
  const message = new Uint8Array(4 + header.length + file.size);
  new DataView(message.buffer).setUint32(0, header.length);
  message.set(header, 4);
  message.set(new Uint8Array(await file.arrayBuffer()), 4 + header.length);
  return message;
}

function base64url(text) {
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
