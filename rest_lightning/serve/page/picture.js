// Frames as they come, decoded shortly before they are due: H.264 by WebCodecs, JPEG where there is no VideoDecoder.

import { FPS, TYPE } from "./protocol.js";

const AHEAD = 8; // frames decoded before they are due; decoders own few frame buffers
const MAX_IN_WORK = 12; // what the decoder has cannot be skipped any more
const FRAME_US = 1e6 / FPS;

export class Picture {
  constructor(codecString) {
    this.codecString = codecString;
    this.waiting = []; // not decoded yet, in their order
    this.ready = []; // {index, epoch, image}
    this.epochs = new Map(); // of frames in the decoder, by their number
    this.needsKey = true;
    this.numFailed = 0;
  }

  /** Take in a message with one frame. */
  push(unit) {
    this.waiting.push(unit);
    // Nobody looked for a while (a hidden tab): only the last picture group is of use.
    if (this.waiting.length > 10 * FPS) {
      const key = this.waiting.findLastIndex(({ isKey, type }) => isKey || type === TYPE.jpeg);
      if (key > 0) this.waiting.splice(0, key);
    }
  }

  /** Decode what is due soon. @param {number} index of the frame that is due now @param {number} epoch of the page */
  decodeUpTo(index, epoch) {
    this.skipTo(index);
    while (this.waiting.length) {
      const [next] = this.waiting;
      if (next.epoch >= epoch && next.index > index + AHEAD) return;
      // A keyframe always goes in: it heals a decoder that swallowed frames.
      if (this.epochs.size >= MAX_IN_WORK && !next.isKey) return;
      const unit = this.waiting.shift();
      if (unit.type === TYPE.jpeg) this.decodeJpeg(unit);
      else this.decodeH264(unit);
    }
  }

  /** Where a later group is due already, what lies before it need not be decoded. */
  skipTo(index) {
    const key = this.waiting.findLastIndex((unit) => unit.index <= index && (unit.isKey || unit.type === TYPE.jpeg));
    if (key > AHEAD) this.waiting.splice(0, key);
  }

  decodeH264(unit) {
    if (this.needsKey && !unit.isKey) return;
    if (this.decoder?.state !== "configured") this.configure();
    this.needsKey = false;
    const type = unit.isKey ? "key" : "delta";
    // The frame number travels as its time; the epoch is found again by it.
    this.epochs.set(unit.index, unit.epoch);
    try {
      this.decoder.decode(new EncodedVideoChunk({ type, timestamp: unit.index * FRAME_US, data: unit.data }));
    } catch {
      this.fail();
    }
  }

  configure() {
    this.decoder = new VideoDecoder({
      output: (frame) => {
        const index = Math.round(frame.timestamp / FRAME_US);
        const epoch = this.epochs.get(index);
        for (const earlier of this.epochs.keys()) if (earlier <= index) this.epochs.delete(earlier);
        this.ready.push({ index, epoch, image: frame });
      },
      error: () => this.fail(),
    });
    this.decoder.configure({ codec: this.codecString, optimizeForLatency: true });
  }

  /** Go on with the next keyframe. */
  fail() {
    this.numFailed += 1;
    this.needsKey = true;
    this.epochs.clear();
  }

  async decodeJpeg({ index, epoch, data }) {
    this.epochs.set(index, epoch);
    try {
      const image = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
      this.ready.push({ index, epoch, image });
      this.ready.sort((a, b) => a.index - b.index);
    } catch {
      this.numFailed += 1;
    }
    this.epochs.delete(index);
  }

  /** The newest decoded frame that is due, or null; older ones and those of earlier epochs are given back. */
  take(index, epoch) {
    let found = null;
    while (this.ready.length && (this.ready[0].epoch < epoch || this.ready[0].index <= index)) {
      const next = this.ready.shift();
      found?.image.close();
      found = null;
      if (next.epoch < epoch) next.image.close();
      else found = next;
    }
    return found;
  }

  close() {
    for (const { image } of this.ready) image.close();
    [this.ready, this.waiting] = [[], []];
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
  }
}
