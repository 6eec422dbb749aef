// Where speech comes from: the microphone, or a sound file in real time. Both give (samples, time, peak) of 20 ms blocks.

import { SAMPLE_RATE, upload } from "./protocol.js";

const BLOCK = SAMPLE_RATE / 50;
const BEHIND_S = 0.1; // a file that fell further behind (a sleeping tab) does not catch up: the server would refuse
const MAX_UPLOAD_BYTES = 20e6;

const WHY = {
  NotAllowedError: "The microphone was not allowed. Allow it beside the address, or drop a sound file.",
  NotFoundError: "No microphone was found. Connect one, or drop a sound file.",
  NotReadableError: "Another program holds the microphone. Close it, or drop a sound file.",
};

export class Microphone {
  constructor(context, onBlock) {
    this.context = context;
    this.onBlock = onBlock;
  }

  async start({ echoCancellation }) {
    if (!navigator.mediaDevices) {
      throw new Error("Browsers give the microphone to https:// and localhost only. Drop a sound file instead.");
    }
    const processing = { echoCancellation, noiseSuppression: echoCancellation, autoGainControl: echoCancellation };
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, ...processing } });
    } catch (error) {
      throw new Error(WHY[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    await this.context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    this.input = this.context.createMediaStreamSource(this.stream);
    const shape = { numberOfInputs: 1, numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" };
    this.node = new AudioWorkletNode(this.context, "capture", shape);
    this.node.port.onmessage = ({ data }) => this.onBlock(data.samples, data.time, data.peak);
    this.input.connect(this.node);
  }

  stop() {
    this.input?.disconnect();
    this.node?.port.postMessage("stop");
    if (this.node) this.node.port.onmessage = null;
    this.stream?.getTracks().forEach((track) => track.stop());
  }
}

export class SoundFile {
  /** @param {(done: boolean) => void} onEnd */
  constructor(context, onBlock, onEnd) {
    this.context = context;
    this.onBlock = onBlock;
    this.onEnd = onEnd;
    this.position = 0;
  }

  /** The server decodes, so that every format works that it knows. */
  async load(file) {
    if (file.size > MAX_UPLOAD_BYTES) {
      throw new Error(`That file has ${Math.round(file.size / 1e6)} MB; at most ${MAX_UPLOAD_BYTES / 1e6} are taken.`);
    }
    const answer = await upload("api/speech", file);
    const bytes = await answer.arrayBuffer();
    this.samples = new Int16Array(bytes.slice(0, bytes.byteLength & ~1)); // every browser's machine is little-endian
  }

  get durationS() { return this.samples.length / SAMPLE_RATE; }

  get positionS() { return this.position / SAMPLE_RATE; }

  start() {
    this.startTime = this.context.currentTime;
    this.timer = setInterval(() => this.tick(), 20);
  }

  tick() {
    const behind = this.context.currentTime - this.startTime - this.positionS;
    if (behind > BEHIND_S) this.startTime += behind - BEHIND_S;
    while (this.startTime + (this.position + BLOCK) / SAMPLE_RATE <= this.context.currentTime) {
      const samples = this.samples.slice(this.position, this.position + BLOCK);
      if (!samples.length) {
        this.stop();
        this.onEnd();
        return;
      }
      const peak = samples.reduce((a, b) => Math.max(a, Math.abs(b)), 0) / 32768;
      this.onBlock(samples, this.startTime + this.positionS, peak);
      this.position += samples.length;
    }
  }

  stop() { clearInterval(this.timer); }
}
