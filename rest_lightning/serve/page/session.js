// One session: connection, player and at most one source of speech, held together by the epoch.

import { Connection, FPS, SAMPLES_PER_FRAME, SAMPLE_RATE } from "./protocol.js";
import { Microphone, SoundFile } from "./microphone.js";
import { Player } from "./player.js";

const STATS_MS = 2000;
const KEPT_BLOCKS = 500; // ten seconds: when a sample was captured
const KEPT_CHUNKS = 1500; // a minute: a chunk may be as short as a frame
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;

export class Session {
  /**
   * @param {AudioContext} context
   * @param {HTMLCanvasElement} canvas
   * @param {object} events onFrame, onLevel(peak), onSourceEnd, onIdentity(id), onError(line), onClosed(line, isLost)
   */
  constructor(context, canvas, events) {
    this.context = context;
    this.events = events;
    this.epoch = this.numSamples = 0;
    this.captured = []; // {index, time} of blocks sent in this epoch
    this.chunks = []; // the server's account of the last chunks
    this.source = null;
    this.recording = null; // who waits for the server's recording: {resolve, reject}
    this.player = new Player(context, canvas, {
      isLoopback: LOOPBACK.test(location.hostname),
      onFrame: (frame) => this.onFrame(frame),
    });
  }

  async open(portrait) {
    this.connection = new Connection({
      binary: (message) => this.player.receive(message),
      json: (message) => this.onMessage(message),
      closed: (line, isLost) => this.onClosed(line, isLost),
    });
    try {
      this.hello = await this.connection.open(portrait);
    } catch (error) {
      this.release();
      throw error;
    }
    this.player.start(this.hello);
    this.timer = setInterval(() => this.sendStats(), STATS_MS);
  }

  // -- speech ---------------------------------------------------------------------------------------------------------

  async speak(options) {
    this.stopSource();
    const source = new Microphone(this.context, (...block) => this.send(source, ...block));
    this.source = source;
    try {
      await source.start(options);
    } catch (error) {
      this.stopSource();
      throw error;
    }
  }

  async play(file) {
    this.stopSource();
    const source = new SoundFile(this.context, (...block) => this.send(source, ...block), () => this.endSource(source));
    await source.load(file);
    this.source = source;
    source.start();
  }

  get isSpeaking() { return this.source instanceof Microphone; }

  send(source, samples, time, peak) {
    if (source !== this.source) return;
    this.events.onLevel(peak);
    if (!this.connection.sendSpeech(this.epoch, this.numSamples, samples)) return;
    this.captured.push({ index: this.numSamples, time });
    if (this.captured.length > KEPT_BLOCKS) this.captured.shift();
    this.numSamples += samples.length;
  }

  endSource(source) {
    if (source !== this.source) return;
    this.stopSource();
    this.events.onSourceEnd();
  }

  stopSource() {
    this.source?.stop();
    this.source = null;
    this.events.onLevel(0);
  }

  // -- control --------------------------------------------------------------------------------------------------------

  /** Silence now; what was said before is forgotten on both sides. A microphone goes on listening. */
  interrupt() {
    this.epoch += 1;
    this.numSamples = 0;
    this.captured = [];
    this.player.interrupt(this.epoch);
    this.connection.send({ type: "interrupt", epoch: this.epoch });
    if (this.source instanceof SoundFile) this.endSource(this.source);
  }

  /** The server says that what it sent before is void: somebody has begun to speak. The face goes on. */
  beInterrupted(epoch) {
    if (epoch <= this.epoch) return;
    this.epoch = epoch;
    this.numSamples = 0;
    this.captured = [];
    this.player.beInterrupted(epoch);
  }

  changeIdentity(portrait) { this.connection.send({ type: "identity", portrait }); }

  /** Whether the server records what it sends, and signs it. */
  get records() { return Boolean(this.hello?.limits.record_s); }

  /** Let the server record from now on. Resolves with its `recorded`, whoever ends the recording. */
  record() {
    this.connection.send({ type: "record", on: true });
    return new Promise((resolve, reject) => { this.recording = { resolve, reject }; });
  }

  stopRecording() { this.connection.send({ type: "record", on: false }); }

  close() {
    this.connection?.close();
    this.release();
  }

  release() {
    clearInterval(this.timer);
    this.stopSource();
    this.player.close();
    this.recording?.reject(new Error("The recording has gone with the session."));
    this.recording = null;
  }

  // -- what comes back ------------------------------------------------------------------------------------------------

  onMessage(message) {
    if (message.type === "interrupt") {
      this.beInterrupted(message.epoch);
    } else if (message.type === "caption") {
      this.events.onCaption?.(message.who, message.text);
    } else if (message.type === "chunk") {
      this.chunks.push(message);
      if (this.chunks.length > KEPT_CHUNKS) this.chunks.shift();
    } else if (message.type === "identity") {
      this.events.onIdentity(message.portrait);
    } else if (message.type === "recorded") {
      this.recording?.resolve(message);
      this.recording = null;
    } else if (message.type === "error" && message.code === "record" && this.recording) {
      this.recording.reject(new Error(message.message));
      this.recording = null;
    } else if (message.type === "error" && this.hello) {
      this.events.onError(message.message);
    }
  }

  onClosed(line, isLost) {
    this.release();
    this.events.onClosed(line, isLost);
  }

  onFrame(frame) {
    frame.latency = this.latencyOf(frame);
    this.events.onFrame(frame);
  }

  /** Seconds from the capture of the first sample that a frame shows to its drawing; null for frames without speech. */
  latencyOf({ index, epoch, heard }) {
    const chunk = this.chunks.findLast((one) => one.index <= index && index < one.index + one.frames);
    if (!chunk || epoch !== this.epoch || chunk.epoch !== epoch || chunk.input_sample == null) return null;
    // `input_sample` is the last sample of speech that the chunk shows; behind it the server filled up with silence.
    const end = chunk.speech_samples ?? chunk.frames * SAMPLES_PER_FRAME;
    const sample = chunk.input_sample - (end - 1) + (index - chunk.index) * SAMPLES_PER_FRAME;
    const block = this.captured.findLast((one) => one.index <= sample);
    const age = block ? (sample - block.index) / SAMPLE_RATE : Infinity;
    return sample <= chunk.input_sample && age < 1 / FPS ? heard - (block.time + age) : null; // older: nothing was captured for this frame
  }

  figures() {
    const latencies = this.player.shown.map(({ latency }) => latency).filter((latency) => latency != null);
    const recent = latencies.slice(-2 * FPS);
    return {
      ...this.player.figures(),
      latencyMs: recent.length ? (recent.reduce((a, b) => a + b, 0) / recent.length) * 1000 : null,
      chunk: this.chunks.at(-1) ?? null,
    };
  }

  sendStats() {
    const { fps, offsetMs, latencyMs, numShown, numLost, numUnderruns, cushionMs } = this.figures();
    const slackMs = this.player.timeline.takeSpare() * 1000;
    this.connection.send({
      type: "stats", slack_ms: slackMs, fps, offset_ms: offsetMs, latency_ms: latencyMs, shown_frames: numShown, lost_frames: numLost,
      underruns: numUnderruns, cushion_ms: cushionMs,
    });
  }
}
