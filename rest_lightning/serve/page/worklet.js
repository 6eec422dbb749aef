// Runs on the audio thread: the microphone as 16 kHz blocks of 20 ms, each with the time of its first sample.
// Browsers give the microphone at the context's rate only (Firefox refuses a 16 kHz context), so it is resampled here.

import { Resampler } from "./resample.js";

const RATE_HZ = 16000;
const BLOCK = 320;
const QUANTUM = 128;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE_HZ);
    this.block = new Int16Array(BLOCK);
    this.filled = this.numOut = this.peak = 0;
    this.silence = new Float32Array(QUANTUM);
    this.isStopped = false;
    this.port.onmessage = () => { this.isStopped = true; };
  }

  process([[channel]]) {
    this.startTime ??= currentTime;
    // A muted track gives no channel; time goes on all the same.
    for (const sample of this.resampler.push(channel ?? this.silence)) {
      this.peak = Math.max(this.peak, Math.abs(sample));
      this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === BLOCK) this.post();
    }
    return !this.isStopped;
  }

  post() {
    const time = this.startTime + this.numOut / RATE_HZ;
    this.port.postMessage({ samples: this.block, time, peak: this.peak }, [this.block.buffer]);
    this.block = new Int16Array(BLOCK);
    this.numOut += BLOCK;
    this.filled = this.peak = 0;
  }
}

registerProcessor("capture", Capture);
