// Measures the page from inside: when pictures are drawn, when sound is heard, and what the pictures say.
// Evaluated in the page by benchmarks/_browser.py; it uses what the page exports and no second implementation of it.
async ({ isMarked }) => {
  const { app } = await import("/page/app.js");
  const { TYPE, toFloats, SAMPLE_RATE, SAMPLES_PER_FRAME } = await import("/page/protocol.js");
  const LOUD = 0.1, QUIET = SAMPLE_RATE / 20, COLUMNS = 8, ROWS = 4, CHECK = 0xa5, ONSET_STEP = 10;
  const { session } = app, { player, context } = session;
  const probe = { frames: [], sent: [], heard: [], spoken: [], arrivals: [], louds: [] };

  /** Finds where beeps begin in a stream of 16 kHz samples. */
  const finder = (found) => {
    let quiet = QUIET;
    return (samples, ...where) => samples.forEach((sample, i) => {
      if (Math.abs(sample) > LOUD) {
        if (quiet >= QUIET) found(i, ...where);
        quiet = 0;
      } else quiet += 1;
    });
  };

  /** What a marked frame says; see benchmarks/_marked_model.py. */
  const readMarks = () => {
    const { width, height } = player.canvas;
    const pixels = player.paint.getImageData(0, 0, width, height).data;
    const bytes = Array.from({ length: ROWS }, (_, row) => {
      const y = Math.floor((row + 0.5) * (height / ROWS));
      return Array.from({ length: COLUMNS }).reduce((byte, _, column) => {
        const x = Math.floor((column + 0.5) * (width / COLUMNS));
        return (byte << 1) | (pixels[4 * (y * width + x) + 1] > 128);
      }, 0);
    });
    const [low, high, beep, check] = bytes;
    if ((low ^ high ^ beep ^ CHECK) !== check) return null;
    return { number: low | (high << 8), onset: beep & 1 ? ((beep >> 1) & 63) * ONSET_STEP : null, bright: beep >> 7 === 1 };
  };
  probe.readMarks = readMarks;

  /** Milliseconds of performance.now() at which a moment of the graph leaves the loudspeaker. */
  const leaves = (time) => {
    const { contextTime, performanceTime } = context.getOutputTimestamp();
    return performanceTime + 1000 * (time - contextTime);
  };

  // Pictures: every frame that the player draws.
  const onFrame = player.onFrame;
  player.onFrame = (frame) => {
    onFrame(frame);
    const { index, epoch, isIdle, latency } = frame;
    probe.frames.push({
      index, epoch, isIdle, latency: latency ?? null, late: 1000 * (frame.heard - frame.at), drawn: performance.now(), time: context.currentTime,
      marks: isMarked ? readMarks() : null,
    });
  };

  // Sound: what the speakers get, tapped behind the player by the page's own capture worklet.
  await context.audioWorklet.addModule("/page/worklet.js");
  const tap = new AudioWorkletNode(context, "capture", { channelCount: 1, channelCountMode: "explicit", numberOfOutputs: 0 });
  const hear = finder((i, time) => probe.heard.push({ time: time + i / SAMPLE_RATE, leaves: leaves(time + i / SAMPLE_RATE) }));
  tap.port.onmessage = ({ data: { samples, time, peak } }) => {
    hear(Array.from(samples, (sample) => sample / 32768), time);
    const last = samples.findLastIndex((sample) => Math.abs(sample) > LOUD * 32768);
    if (last >= 0) probe.louds = [...probe.louds, time + last / SAMPLE_RATE].slice(-200);
  };
  player.mix.connect(tap);

  // Speech that goes up.
  const speak = finder((i, time) => probe.spoken.push({ time: time + i / SAMPLE_RATE }));
  const send = session.send;
  session.send = (source, samples, time, peak) => {
    speak(Array.from(samples, (sample) => sample / 32768), time);
    send.call(session, source, samples, time, peak);
  };

  // Messages that come down: in which frame a beep begins, by the server's account.
  const receive = player.receive;
  const place = finder((i, index) => probe.sent.push({ index: index + Math.floor(i / SAMPLES_PER_FRAME), onset: i % SAMPLES_PER_FRAME }));
  player.receive = (message) => {
    if (message.type === TYPE.sound) {
      probe.arrivals.push({ index: message.index, time: context.currentTime, ahead: (player.timeline.end ?? NaN) - context.currentTime });
      place(toFloats(message.data), message.index);
    }
    receive.call(player, message);
  };

  /** What was measured since the last time: an hour of it would fill the memory that is measured. */
  probe.drain = () => {
    const names = ["frames", "sent", "heard", "spoken", "arrivals"];
    const taken = Object.fromEntries(names.map((name) => [name, probe[name]]));
    for (const name of names) probe[name] = [];
    return { ...taken, figures: session.figures(), ended: performance.now() };
  };

  /** Interrupts, and watches until new pictures come; times in ms. */
  probe.interrupt = () => new Promise((resolve) => {
    const { canvas, paint } = player, still = document.createElement("canvas");
    [still.width, still.height] = [canvas.width, canvas.height];
    const other = still.getContext("2d"), { rest } = player, side = Math.min(rest.width, rest.height);
    const [left, top] = [(rest.width - side) / 2, (rest.height - side) / 2];
    other.drawImage(rest, left, top, side, side, 0, 0, still.width, still.height);
    const portrait = other.getImageData(0, 0, still.width, still.height).data;
    const start = performance.now(), startTime = context.currentTime, numBefore = probe.frames.length;
    app.session.interrupt();
    const result = { gone: null, fresh: null, silent: null };
    const watch = () => {
      const now = performance.now(), pixels = paint.getImageData(0, 0, canvas.width, canvas.height).data;
      let difference = 0;
      for (let i = 0; i < pixels.length; i += 4) difference = Math.max(difference, Math.abs(pixels[i] - portrait[i]));
      const isFresh = probe.frames.length > numBefore;
      if (result.gone === null && (difference <= 3 || isFresh)) result.gone = now - start;
      if (isFresh && result.fresh === null) result.fresh = now - start;
      if (result.fresh === null && now - start < 5000) return requestAnimationFrame(watch);
      // Sound that was on its way when the graph went silent still leaves the loudspeaker.
      const latency = leaves(startTime) - start;
      return setTimeout(() => {
        const begins = player.timeline.chunks[0]?.start ?? Infinity; // of what was said after the interruption
        const louds = probe.louds.filter((time) => time > startTime && time < begins);
        result.wasLoud = probe.louds.some((time) => time > startTime - 0.1 && time <= startTime + 0.02);
        result.silent = 1000 * Math.max(0, (louds.at(-1) ?? startTime) - startTime) + Math.max(0, latency);
        resolve(result);
      }, 100);
    };
    requestAnimationFrame(watch);
  });

  globalThis.probe = probe;
}
