// Messages between page and server; docs/protocol.md describes them.

export const VERSION = 2;
export const FPS = 25;
export const SAMPLE_RATE = 16000;
export const SAMPLES_PER_FRAME = SAMPLE_RATE / FPS;
export const TYPE = Object.freeze({ speech: 1, h264: 2, jpeg: 3, sound: 4 });
const KEY = 1, IDLE = 2, HEADER_BYTES = 16;
const MAX_BACKLOG_BYTES = 2 * SAMPLE_RATE * 2; // two seconds of speech that the network has not taken

/** Speech as a binary message: header, then s16le samples. */
export function packSpeech(epoch, index, samples) {
  const message = new ArrayBuffer(HEADER_BYTES + 2 * samples.length);
  const header = new DataView(message);
  header.setUint8(0, TYPE.speech);
  header.setUint32(4, epoch, true);
  header.setUint32(8, index, true);
  header.setUint32(12, samples.length, true);
  // DataView writes little-endian on every machine; an Int16Array would write what the machine has.
  samples.forEach((sample, i) => header.setInt16(HEADER_BYTES + 2 * i, sample, true));
  return message;
}

/** A binary message of the server, or null when it is none. */
export function unpack(message) {
  if (message.byteLength < HEADER_BYTES) return null;
  const header = new DataView(message);
  const type = header.getUint8(0), flags = header.getUint8(1);
  return {
    type,
    isKey: (flags & KEY) !== 0,
    isIdle: (flags & IDLE) !== 0,
    epoch: header.getUint32(4, true),
    index: header.getUint32(8, true),
    count: header.getUint32(12, true),
    data: new Uint8Array(message, HEADER_BYTES),
  };
}

/** s16le bytes as floats in [-1, 1). */
export function toFloats(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength & ~1);
  return Float32Array.from({ length: view.byteLength / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

/** What this browser can show, best first. VideoDecoder exists on localhost and behind TLS only. */
export async function supportedCodecs() {
  const config = { codec: "avc1.42E01F", optimizeForLatency: true };
  const support = await globalThis.VideoDecoder?.isConfigSupported(config).catch(() => null);
  return support?.supported ? ["h264", "jpeg"] : ["jpeg"];
}

/** A request to the server; an Error with the server's own line when it refuses. */
export async function request(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: is `rest serve` still running?");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let line = text;
  try { line = JSON.parse(text).error ?? text; } catch { /* plain text */ }
  throw new Error(line.trim().slice(0, 300) || `The server refused (${answer.status}).`);
}

/** Upload one file; the answer of the server. */
export function upload(path, file) {
  const form = new FormData();
  form.append("file", file, file.name || "file");
  return request(path, { method: "POST", body: form });
}

/** One WebSocket session: `open` resolves when both sides have said hello. */
export class Connection {
  /** @param {{binary: Function, json: Function, closed: Function}} handlers */
  constructor(handlers) {
    this.handlers = handlers;
    this.hello = null;
    this.reason = ""; // the server's last word
    this.numRefused = 0; // speech blocks that the network did not take in time
  }

  async open(portrait, seed = 0) {
    const [codecs, answer] = await Promise.all([supportedCodecs(), request("api/session", { method: "POST" })]);
    const { token } = await answer.json();
    const address = new URL(`ws?token=${encodeURIComponent(token)}`, document.baseURI); // a proxy may serve us below a prefix
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      this.socket.onopen = () => this.send({ type: "hello", version: VERSION, codecs, portrait, seed });
      this.socket.onmessage = ({ data }) => this.receive(data, resolve);
      this.socket.onclose = ({ code }) => {
        const line = this.reason || `The connection was lost (${code}).`;
        if (this.hello) this.handlers.closed(line, !this.reason);
        else reject(new Error(line));
      };
    });
  }

  receive(data, resolve) {
    if (data instanceof ArrayBuffer) {
      const message = unpack(data);
      if (message) this.handlers.binary(message);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "hello") {
      this.hello = message;
      resolve(message);
      return;
    }
    if (message.type === "bye") this.reason = message.reason || "The server ended the session.";
    if (message.type === "error") this.reason ||= this.hello ? "" : message.message;
    this.handlers.json(message);
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  /** Whether the block went out; a network that is too slow loses speech rather than gathering delay. */
  sendSpeech(epoch, index, samples) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    if (this.socket.bufferedAmount > MAX_BACKLOG_BYTES) {
      this.numRefused += 1;
      return false;
    }
    this.socket.send(packSpeech(epoch, index, samples));
    return true;
  }

  close() {
    this.reason ||= "You ended the session.";
    this.send({ type: "end" });
    this.socket?.close(1000);
  }
}
