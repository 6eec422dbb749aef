// The figures, twice a second, and the time of every chunk as a plot.

const NUM_BARS = 40;
const REAL_TIME_MS = 960;

const whole = (value, unit) => (value == null ? "–" : `${Math.round(value)} ${unit}`);
const signed = (value) => (value == null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(Math.round(value))} ms`);

/** What stands beside every name. */
export function describe({ latencyMs, fps, offsetMs, numShown, numLost, numUnderruns, cushionMs, chunk }) {
  return {
    latency: latencyMs == null ? "–" : `${(latencyMs / 1000).toFixed(2)} s`,
    fps: fps == null ? "–" : fps.toFixed(1),
    offset: signed(offsetMs),
    lost: `${numLost} of ${numShown + numLost}`,
    underruns: String(numUnderruns),
    cushion: whole(cushionMs, "ms"),
    chunk: whole(chunk?.compute_ms, "ms"),
    rows: chunk ? `${chunk.rows} ${chunk.rows === 1 ? "session" : "sessions"}` : "–",
  };
}

export class Panel {
  constructor(root) {
    this.values = Object.fromEntries([...root.querySelectorAll("[data-figure]")].map((el) => [el.dataset.figure, el]));
    this.plot = root.querySelector("canvas");
    this.paint = this.plot.getContext("2d");
  }

  /** @param {object | null} figures of the session, null without one @param {object[]} chunks the server's account */
  update(figures, chunks) {
    const words = figures ? describe(figures) : {};
    for (const [name, element] of Object.entries(this.values)) element.textContent = words[name] ?? "–";
    // Frames of one chunk of the model tell the same times.
    const isOther = ({ compute_ms: compute }, i) => compute && compute !== chunks[i - 1]?.compute_ms;
    this.draw(chunks.filter(isOther).slice(-NUM_BARS));
  }

  draw(chunks) {
    const { plot, paint } = this, style = getComputedStyle(plot), scale = devicePixelRatio || 1;
    const width = plot.clientWidth, height = plot.clientHeight;
    if (!width) return;
    if (plot.width !== Math.round(width * scale)) [plot.width, plot.height] = [width * scale, height * scale].map(Math.round);
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    const colour = (name) => style.getPropertyValue(name).trim();
    const times = chunks.map(({ compute_ms: compute = 0, queued_ms: queued = 0 }) => ({ compute, queued }));
    const highest = Math.max(200, ...times.map(({ compute, queued }) => 1.15 * (compute + queued)));
    const limit = highest > 0.6 * REAL_TIME_MS ? Math.max(highest, 1.1 * REAL_TIME_MS) : highest;
    const top = 16, base = height - 1, y = (ms) => base - ((base - top) * ms) / limit;
    this.drawLines({ width, limit, y, colour, style });
    const step = width / NUM_BARS, bar = Math.max(2, step - 3);
    times.forEach(({ compute, queued }, i) => {
      const x = width - (times.length - i) * step + (step - bar) / 2;
      paint.fillStyle = colour("--wait");
      paint.fillRect(x, y(compute + queued), bar, y(compute) - y(compute + queued));
      paint.fillStyle = colour(compute > REAL_TIME_MS ? "--alarm" : "--accent");
      paint.fillRect(x, y(compute), bar, base - y(compute));
    });
    plot.setAttribute("aria-label", this.summary(times));
  }

  drawLines({ width, limit, y, colour, style }) {
    const { paint } = this;
    const spacing = [50, 100, 200, 250, 500, 1000, 2000].find((one) => limit / one <= 4) ?? 5000;
    paint.font = `11px ${style.fontFamily}`;
    paint.lineWidth = 1;
    for (let ms = spacing; ms < limit; ms += spacing) {
      paint.strokeStyle = colour("--line");
      paint.beginPath();
      paint.moveTo(0, Math.round(y(ms)) + 0.5);
      paint.lineTo(width, Math.round(y(ms)) + 0.5);
      paint.stroke();
      paint.fillStyle = colour("--soft");
      paint.fillText(`${ms} ms`, 0, Math.round(y(ms)) - 3);
    }
  }

  summary(times) {
    if (!times.length) return "Chunk times: none yet";
    const last = Math.round(times.at(-1).compute);
    return `Times of the last ${times.length} chunks: the latest took ${last} ms; real time is ${REAL_TIME_MS} ms`;
  }
}
