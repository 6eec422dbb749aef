// Sample rate conversion of a stream: a windowed sinc, one set of coefficients per phase of the two rates.

const NUM_ZEROS = 16; // zero crossings of the sinc on each side
const PASS = 0.92; // of the lower rate's band: the rest is the filter's slope

const gcd = (a, b) => (b ? gcd(b, a % b) : a);
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const blackman = (x) => (Math.abs(x) >= 1 ? 0 : 0.42 + 0.5 * Math.cos(Math.PI * x) + 0.08 * Math.cos(2 * Math.PI * x));

/**
 * Output sample n lies at input sample n * from / to: nothing is shifted, the last samples of a block come with the next.
 * How the stream was cut into blocks makes no difference.
 */
export class Resampler {
  /** @param {number} from Hz @param {number} to Hz */
  constructor(from, to) {
    const divisor = gcd(from, to);
    [this.from, this.to] = [from / divisor, to / divisor];
    const cutoff = PASS * Math.min(1, to / from);
    this.half = Math.ceil(NUM_ZEROS / cutoff);
    this.coefficients = Array.from({ length: this.to }, (_, phase) => this.kernel(phase / this.to, cutoff));
    this.tail = new Float32Array(this.half); // silence before the first sample
    this.numIn = this.numOut = 0;
  }

  kernel(fraction, cutoff) {
    const taps = Float64Array.from({ length: 2 * this.half }, (_, i) => {
      const x = i - this.half + 1 - fraction;
      return sinc(cutoff * x) * blackman(x / this.half);
    });
    const sum = taps.reduce((a, b) => a + b, 0);
    return taps.map((tap) => tap / sum);
  }

  /** @param {Float32Array} input @returns {Float32Array} all samples that no later input can change */
  push(input) {
    const { from, to, half } = this;
    const buffer = new Float32Array(this.tail.length + input.length);
    buffer.set(this.tail);
    buffer.set(input, this.tail.length);
    this.numIn += input.length;
    const first = this.numIn - buffer.length; // where the buffer lies in the stream
    // The last output whose right-hand neighbours are all here.
    const end = Math.max(this.numOut, Math.floor(((this.numIn - half) * to - 1) / from) + 1);
    const output = new Float32Array(end - this.numOut);
    for (let k = 0; k < output.length; k++) {
      const at = (this.numOut + k) * from;
      const start = Math.floor(at / to) - half + 1 - first;
      const taps = this.coefficients[at % to];
      let sum = 0;
      for (let i = 0; i < taps.length; i++) sum += taps[i] * buffer[start + i];
      output[k] = sum;
    }
    this.numOut = end;
    this.tail = buffer.slice(Math.max(0, Math.floor((end * from) / to) - half + 1 - first));
    return output;
  }
}
