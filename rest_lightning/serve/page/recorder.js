// Saves what is seen and heard. A server that signs records for itself what it sends. Else the browser's own MediaRecorder
// encodes; MP4 where it can (Chrome, Safari), else WebM.

import { request } from "./protocol.js";
import { tag } from "./provenance.js";

const TYPES = [
  "video/mp4;codecs=avc1.42E01F,mp4a.40.2",
  "video/mp4;codecs=avc1.42E01F,opus",
  "video/mp4",
  "video/webm;codecs=vp9,opus",
  "video/webm",
];
const VIDEO_BITS_PER_S = 2_500_000;

export const recordingType = () => TYPES.find((type) => globalThis.MediaRecorder?.isTypeSupported(type)) ?? null;

export class Recorder {
  /** @param {import("./player.js").Player} player */
  constructor(player) {
    const { context, canvas, mix } = player;
    const mimeType = recordingType();
    if (!mimeType) throw new Error("This browser cannot record video.");
    this.output = context.createMediaStreamDestination();
    // The canvas shows what is heard now; the graph is ahead of that by the latency of the loudspeaker.
    const lag = Math.min(1, Math.max(0, context.currentTime - player.heard()));
    this.delay = context.createDelay(1);
    this.delay.delayTime.value = lag;
    mix.connect(this.delay).connect(this.output);
    const stream = new MediaStream([...canvas.captureStream().getTracks(), ...this.output.stream.getTracks()]);
    this.recorder = new MediaRecorder(stream, { mimeType, videoBitsPerSecond: VIDEO_BITS_PER_S });
    this.parts = [];
    this.recorder.ondataavailable = ({ data }) => { if (data.size) this.parts.push(data); };
    this.recorder.start(1000);
  }

  /** The finished file: {blob, name}. */
  async stop() {
    await new Promise((resolve) => {
      this.recorder.onstop = resolve;
      if (this.recorder.state === "inactive") resolve();
      else this.recorder.stop();
    });
    this.delay.disconnect();
    const type = this.recorder.mimeType.split(";")[0];
    const blob = await tag(new Blob(this.parts, { type }));
    const time = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
    return { blob, name: `synthetic-talking-head-${time}.${type.split("/")[1]}` };
  }
}

export class SignedRecorder {
  /**
   * @param {import("./session.js").Session} session
   * @param {Function} onEnd called when the recording has ended, whoever ended it
   */
  constructor(session, onEnd) {
    this.session = session;
    this.recorded = session.record();
    this.recorded.then(onEnd, onEnd);
  }

  /** The finished file: {blob, name, why}; `why` where the server ended it. It is fetched while the session lasts. */
  async stop() {
    this.session.stopRecording();
    const { url, name, why } = await this.recorded;
    return { blob: await (await request(url)).blob(), name, why };
  }
}

/** Hand a file to the user. */
export function save({ blob, name }) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
