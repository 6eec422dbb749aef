// A recording says in its own metadata that it is synthetic. MediaRecorder cannot write metadata, so it is added here.

export const NOTE = "Synthetic video: an AI model (REST Lightning) generated this talking head from a portrait and speech.";

const text = new TextEncoder();
const bytesOf = (...parts) => {
  const arrays = parts.map((part) => (typeof part === "string" ? Uint8Array.from(part, (c) => c.charCodeAt(0)) : part));
  const whole = new Uint8Array(arrays.reduce((sum, { length }) => sum + length, 0));
  let position = 0;
  for (const array of arrays) {
    whole.set(array, position);
    position += array.length;
  }
  return whole;
};
const uint32 = (value) => Uint8Array.of(value >>> 24, value >>> 16, value >>> 8, value);
const box = (name, ...content) => {
  const body = bytesOf(...content);
  return bytesOf(uint32(8 + body.length), name, body);
};

/** `udta/meta/ilst` as every player reads it (QuickTime metadata, "mdir"). */
function userData(entries) {
  const items = Object.entries(entries).map(([name, value]) => box(name, box("data", uint32(1), uint32(0), text.encode(value))));
  const handler = box("hdlr", uint32(0), uint32(0), "mdir", "appl", new Uint8Array(9));
  return box("udta", box("meta", uint32(0), handler, box("ilst", ...items)));
}

/**
 * MP4 with `udta` at the end of `moov`. A fragmented file, as MediaRecorder writes it, holds no absolute position but in
 * `mfra`, the index at its end, which is optional and left out.
 * @param {Uint8Array} file
 */
function tagMp4(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength), kept = [];
  let isFragmented = false, hasMoov = false;
  for (let position = 0; position + 8 <= file.length;) {
    let size = view.getUint32(position);
    const name = String.fromCharCode(...file.subarray(position + 4, position + 8));
    if (size === 1) size = Number(view.getBigUint64(position + 8));
    if (size === 0) size = file.length - position;
    if (size < 8) return file;
    const whole = file.subarray(position, position + size);
    if (name === "moov") {
      hasMoov = true;
      kept.push(box("moov", whole.subarray(8), userData({ "\u00a9nam": "Synthetic talking head", "\u00a9cmt": NOTE })));
    } else if (name !== "mfra") {
      kept.push(whole);
    }
    isFragmented ||= name === "moof";
    position += size;
  }
  return isFragmented && hasMoov ? bytesOf(...kept) : file;
}

/** WebM with a Tags element behind the last cluster: MediaRecorder leaves the segment's length open. */
function tagWebm(file) {
  const element = (id, content) => bytesOf(id, Uint8Array.of(0x40 | (content.length >> 8), content.length & 255), content);
  const named = (name, value) => element(Uint8Array.of(0x67, 0xc8), bytesOf(
    element(Uint8Array.of(0x45, 0xa3), text.encode(name)), element(Uint8Array.of(0x44, 0x87), text.encode(value)),
  ));
  const targets = Uint8Array.of(0x63, 0xc0, 0x80);
  const tag = element(Uint8Array.of(0x73, 0x73), bytesOf(targets, named("COMMENT", NOTE)));
  return bytesOf(file, element(Uint8Array.of(0x12, 0x54, 0xc3, 0x67), tag));
}

/** @param {Blob} recording @returns {Promise<Blob>} the same with the note */
export async function tag(recording) {
  const file = new Uint8Array(await recording.arrayBuffer());
  const isMp4 = recording.type.startsWith("video/mp4");
  return new Blob([isMp4 ? tagMp4(file) : tagWebm(file)], { type: recording.type });
}
