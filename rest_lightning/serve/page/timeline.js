// When every chunk plays. One clock: the AudioContext's. Pure arithmetic, no browser.

import { FPS } from "./protocol.js";

const NETWORK_CUSHION_S = 0.25;
const MAX_CUSHION_S = 0.45;
const STEP_S = 0.04; // how much an underrun raises the cushion at least
const LATE_S = 0.005; // a source that is scheduled for less than this ahead may start late
const MAX_AHEAD_S = 2.5; // more than that was buffered while the clock stood still: it is given up
const CALM_FRAMES = 720; // without an underrun before the cushion shrinks again
const KEPT_CHUNKS = 100; // a chunk may be as short as a frame
const [MIN_FRAMES, MAX_FRAMES] = [96, 144]; // the slack of fewer frames says little, of more it is what was long ago
const PICTURE_LATE_S = 0.02; // pictures later than this are waited for from the next chunk on
const SPARE_S = 0.06; // slack that is not worth a pause left out

export class Timeline {
  /** @param {number | null} cushion seconds on loopback; null on a network, where it adapts from 0.25 s on */
  constructor(cushion) {
    this.floor = cushion ?? NETWORK_CUSHION_S;
    this.cushion = this.floor;
    this.chunks = []; // {index, count, start, epoch, isIdle}: seconds on the clock, frames
    this.slacks = []; // {slack, count}: seconds that the last chunks lay here before they were due, and their frames
    this.numUnderruns = this.numCalm = this.pictureLate = 0;
  }

  /**
   * Place a chunk behind the last one; after an underrun, or as the first, a cushion from now.
   * @param {{index: number, count: number, epoch: number, isIdle: boolean}} chunk
   * @param {number} now seconds, as the sources are scheduled
   * @returns the chunk with `start`, and `isJoined` where it follows the last one; null when it is given up
   */
  place(chunk, now) {
    const isFirst = this.end === undefined, slack = isFirst ? 0 : this.end - now;
    if (slack > MAX_AHEAD_S) return null;
    const isLate = !isFirst && (slack < LATE_S || this.pictureLate > PICTURE_LATE_S);
    const isJoined = !(isFirst || isLate), start = isJoined ? this.end : this.rebase(now, slack, isFirst);
    if (isJoined) this.relax(chunk.count);
    this.slacks = isJoined ? [...this.slacks, { slack, count: chunk.count }] : [];
    while (this.numMeasured > MAX_FRAMES) this.slacks.shift();
    this.end = start + chunk.count / FPS;
    this.chunks = [...this.chunks, { ...chunk, start }].slice(-KEPT_CHUNKS);
    return { ...chunk, start, isJoined };
  }

  /** Where the clock begins anew: a cushion from now, a larger one each time that it was too small. */
  rebase(now, slack, isFirst) {
    if (isFirst) return now + this.cushion;
    const missing = Math.max(-slack, this.pictureLate);
    this.pictureLate = this.numCalm = 0;
    this.numUnderruns += 1;
    this.cushion = Math.min(MAX_CUSHION_S, this.cushion + Math.max(STEP_S, Math.min(missing, 0.1)));
    return Math.max(now, this.end) + (slack < LATE_S ? this.cushion : Math.min(missing + PICTURE_LATE_S, MAX_CUSHION_S));
  }

  relax(count) {
    this.numCalm += count;
    if (this.numCalm < CALM_FRAMES) return;
    this.numCalm = 0;
    this.cushion = Math.max(this.floor, this.cushion - STEP_S);
  }

  /** A picture came at a moment when it should have been shown already; sound comes first, so only pictures tell this. */
  notePicture(index, time) {
    const chunk = this.chunks.findLast((one) => one.index <= index && index < one.index + one.count);
    if (chunk) this.pictureLate = Math.max(this.pictureLate, time - chunk.start - (index - chunk.index) / FPS);
  }

  /** Frames of the chunks whose slack is known. */
  get numMeasured() { return this.slacks.reduce((sum, { count }) => sum + count, 0); }

  /**
   * Seconds that chunks lie here beyond the cushion, for the server to win back by leaving out a pause; 0 when it is not
   * worth it. What was told once is measured anew.
   */
  takeSpare() {
    if (this.numMeasured < MIN_FRAMES) return 0;
    const spare = Math.min(...this.slacks.map(({ slack }) => slack)) - this.cushion;
    if (spare < SPARE_S) return 0;
    this.slacks = [];
    return spare;
  }

  /** Forget all chunks (an interruption); the cushion stays as it was learnt. */
  clear() {
    [this.chunks, this.slacks, this.end, this.pictureLate] = [[], [], undefined, 0];
  }

  /** The frame that belongs to a moment: {index, at}, `at` when it was due; the last one in a gap; null before all. */
  frameAt(time) {
    const chunk = this.chunks.findLast(({ start }) => start <= time);
    if (!chunk) return null;
    const offset = Math.min(chunk.count - 1, Math.floor((time - chunk.start) * FPS + 1e-6));
    return { index: chunk.index + offset, at: chunk.start + offset / FPS, chunk };
  }
}
