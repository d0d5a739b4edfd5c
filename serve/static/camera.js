// A camera: its frames, mirrored as in a mirror, and its errors in words.

import { drawCropped, layer } from "./painting.js";

const WORDS = {
  NotAllowedError: "The camera may not be used: allow it beside the page's address, then choose Camera again.",
  NotFoundError: "There is no camera: connect one, then choose Camera again.",
  NotReadableError: "The camera does not answer: another program may use it. Close that program, then choose Camera again.",
  OverconstrainedError: "That camera is not there any more: choose another.",
};
const INSECURE = "Browsers give a camera only to pages over https or from this machine (localhost): open the page there.";
const GONE = "The camera has gone away: connect it again, then choose Camera again.";

export class Camera {
  /** `onFrame` is called for every frame; `onGone` with the reason when the frames end by themselves. */
  constructor(video, { onFrame, onGone }) {
    this.video = video;
    this.onFrame = onFrame;
    this.onGone = onGone;
  }

  /** Start, with the camera of that id or any. Throws an Error whose message is for the user. */
  async start(deviceId) {
    this.stop();
    const attempt = (this.attempt = {});
    const stream = await open(deviceId);
    if (this.attempt !== attempt) return end(stream); // stopped while the user was asked
    this.stream = stream;
    const [track] = stream.getVideoTracks();
    track.addEventListener("ended", () => this.stream === stream && this.lose());
    this.isMirrored = track.getSettings().facingMode !== "environment"; // a phone's back camera is no mirror
    this.video.classList.toggle("mirrored", this.isMirrored);
    this.video.srcObject = stream;
    try {
      await this.video.play();
    } catch (error) {
      if (this.stream === stream) throw new Error(`The camera cannot be shown (${error.message}): choose Camera again.`);
    }
    this.watch(stream); // which does nothing if it was stopped meanwhile
  }

  stop() {
    this.attempt = null;
    if (this.stream) end(this.stream);
    this.stream = null;
    this.video.srcObject = null;
  }

  get deviceId() {
    return this.stream?.getVideoTracks()[0].getSettings().deviceId;
  }

  lose() {
    this.stop();
    this.onGone(GONE);
  }

  watch(stream) {
    const next = () => {
      if (this.stream !== stream) return;
      if (this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) this.onFrame();
      this.watch(stream);
    };
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(next);
    else requestAnimationFrame(next);
  }

  /** The newest frame on a canvas of that size, cropped, and mirrored as it is shown. */
  frame(width, height) {
    const context = layer({ width, height });
    if (this.isMirrored) context.setTransform(-1, 0, 0, 1, width, 0);
    drawCropped(context, this.video, this.video.videoWidth, this.video.videoHeight);
    return context.canvas;
  }
}

/** The cameras, by name; their names are known once one of them may be used. */
export async function cameras() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices.filter(({ kind }) => kind === "videoinput");
}

async function open(deviceId) {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error(INSECURE);
  const choice = deviceId ? { deviceId: { exact: deviceId } } : { facingMode: "user" };
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { ...choice, width: { ideal: 1280 }, height: { ideal: 720 } } });
  } catch (error) {
    throw new Error(WORDS[error.name] ?? `The camera cannot be used (${error.message || error.name}).`);
  }
}

function end(stream) {
  for (const track of stream.getTracks()) track.stop();
}
