// Sound and picture in step. The AudioContext is the one clock: a frame is drawn when its sound is heard.

import { FPS, SAMPLE_RATE, TYPE, toFloats } from "./protocol.js";
import { Picture } from "./picture.js";
import { Resampler } from "./resample.js";
import { Timeline } from "./timeline.js";

const FADE_S = 0.008; // of the sound, so that stopping does not click
const REST_MS = 60; // the old picture gives way to the portrait
const KEPT_FRAMES = 100;

export class Player {
  /**
   * @param {AudioContext} context
   * @param {HTMLCanvasElement} canvas
   * @param {{isLoopback: boolean, onFrame?: Function}} options onFrame is told of every frame that was drawn
   */
  constructor(context, canvas, { isLoopback, onFrame = () => {} }) {
    this.context = context;
    this.canvas = canvas;
    this.paint = canvas.getContext("2d", { alpha: false });
    this.onFrame = onFrame;
    this.mix = context.createGain(); // what a recording hears, muted or not
    this.volume = context.createGain();
    this.mix.connect(this.volume).connect(context.destination);
    this.isLoopback = isLoopback;
    this.newVoice();
    this.epoch = 0;
    this.shown = []; // the last frames: {index, epoch, isIdle, at, heard}: due and drawn, seconds on the clock
    this.numShown = this.numLost = 0;
    this.lastHeard = 0;
  }

  /** @param {object} hello of the server */
  start({ size_px: size, codec_string: codecString, cushion_ms: cushionMs, sample_rate_hz: rate = SAMPLE_RATE }) {
    this.rate = rate;
    this.timeline = new Timeline(this.isLoopback ? cushionMs / 1000 : null);
    this.canvas.width = this.canvas.height = size;
    this.showRest();
    this.picture = new Picture(codecString);
    const tick = () => {
      this.draw();
      this.request = requestAnimationFrame(tick);
    };
    tick();
  }

  newVoice() {
    this.voice = this.context.createGain();
    this.voice.connect(this.mix);
    this.sources = new Set();
  }

  /** The moment that leaves the loudspeaker now. */
  heard() {
    const { context } = this;
    const plain = context.currentTime - (context.outputLatency || context.baseLatency || 0);
    const stamp = context.getOutputTimestamp?.();
    const fine = stamp ? stamp.contextTime + (performance.now() - stamp.performanceTime) / 1000 : plain;
    // Some browsers give nonsense until the first sound has been played.
    const heard = stamp?.contextTime > 0 && Math.abs(fine - plain) < 0.1 ? fine : plain;
    this.lastHeard = Math.max(this.lastHeard, heard);
    return this.lastHeard;
  }

  /** Take in a binary message of the server. */
  receive(message) {
    if (message.type === TYPE.sound) this.schedule(message);
    else if (message.type === TYPE.h264 || message.type === TYPE.jpeg) {
      this.picture.push(message);
      if (!document.hidden) this.timeline.notePicture(message.index, this.heard());
    }
  }

  schedule({ index, count, epoch, isIdle, data }) {
    if (epoch < this.epoch) return;
    const samples = toFloats(data);
    const chunk = { index, count: Math.round((count * FPS) / this.rate), epoch, isIdle };
    const placed = this.timeline.place(chunk, this.context.currentTime);
    if (!placed) return;
    if (!placed.isJoined || !this.resampler) {
      this.resampler = new Resampler(this.rate, this.context.sampleRate);
      this.runStart = placed.start;
    }
    const at = this.runStart + this.resampler.numOut / this.context.sampleRate;
    this.play(this.resampler.push(samples), at);
  }

  play(samples, at) {
    if (!samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, this.context.sampleRate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.voice);
    source.onended = () => this.sources.delete(source);
    this.sources.add(source);
    source.start(at);
  }

  /** Silence and the resting portrait at once; messages of earlier epochs are ignored from now on. */
  interrupt(epoch) {
    this.beInterrupted(epoch);
    this.showRest();
  }

  /** Silence at once; the last picture stays until the next one comes. */
  beInterrupted(epoch) {
    this.epoch = epoch;
    this.hush();
    this.timeline?.clear();
    this.resampler = null;
    this.current = null;
  }

  hush() {
    const { voice, sources } = this, now = this.context.currentTime;
    voice.gain.setValueAtTime(1, now);
    voice.gain.linearRampToValueAtTime(0, now + FADE_S);
    for (const source of sources) source.stop(now + 2 * FADE_S);
    setTimeout(() => voice.disconnect(), 100);
    this.newVoice();
  }

  setMuted(isMuted) {
    this.volume.gain.setTargetAtTime(isMuted ? 0 : 1, this.context.currentTime, 0.01);
  }

  /** The still picture that is shown when there is nothing else. @param {CanvasImageSource | null} image */
  setRest(image) {
    this.rest = image;
    if (!this.current) this.showRest();
  }

  showRest() { this.restSince = performance.now(); }

  draw() {
    const heard = this.heard(), due = this.timeline.frameAt(heard);
    const first = this.timeline.chunks[0]; // decoded before it is due
    this.picture.decodeUpTo(due?.index ?? (first ? first.index - 1 : -Infinity), this.epoch);
    const frame = this.picture.take(due ? due.index : -1, this.epoch);
    if (frame) {
      this.paint.globalAlpha = 1;
      this.paint.drawImage(frame.image, 0, 0, this.canvas.width, this.canvas.height);
      frame.image.close();
      this.restSince = null;
      this.note(frame, due, heard);
    } else if (this.restSince !== null) {
      this.drawRest();
    }
  }

  drawRest() {
    const { rest, canvas, paint } = this, { width } = canvas;
    const side = rest ? Math.min(rest.width, rest.height) : 0;
    const isDone = performance.now() - this.restSince >= REST_MS;
    paint.globalAlpha = isDone ? 1 : 0.4; // drawn over what is there, again and again: it fades
    if (rest) paint.drawImage(rest, (rest.width - side) / 2, (rest.height - side) / 2, side, side, 0, 0, width, width);
    else paint.fillRect(0, 0, width, width);
    if (isDone) this.restSince = null;
  }

  note({ index, epoch }, due, heard) {
    const { current } = this;
    if (current) this.numLost += index - current.index - 1;
    const at = due.at - (due.index - index) / FPS;
    this.current = { index, epoch, at, heard, isIdle: due.chunk.isIdle };
    this.numShown += 1;
    this.shown.push(this.current);
    if (this.shown.length > KEPT_FRAMES) this.shown.shift();
    this.onFrame(this.current);
  }

  /** Of the last two seconds: frames per second, and how long after its sound a picture was drawn. */
  figures() {
    const heard = this.heard(), recent = this.shown.filter((frame) => heard - frame.heard < 2);
    const span = recent.length > 1 ? recent.at(-1).heard - recent[0].heard : 0;
    const offsets = recent.map((frame) => (frame.heard - frame.at) * 1000);
    return {
      fps: span > 0 ? (recent.length - 1) / span : null,
      offsetMs: offsets.length ? offsets.reduce((a, b) => a + b, 0) / offsets.length : null,
      numShown: this.numShown,
      numLost: this.numLost,
      numUnderruns: this.timeline.numUnderruns,
      cushionMs: this.timeline.cushion * 1000,
    };
  }

  close() {
    cancelAnimationFrame(this.request);
    this.interrupt(this.epoch + 1);
    this.picture?.close();
    this.restSince = performance.now() - REST_MS;
    this.drawRest();
    this.mix.disconnect();
  }
}
