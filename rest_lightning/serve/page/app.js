// What the user sees and presses.

import { request, upload } from "./protocol.js";
import { Panel } from "./panel.js";
import { Recorder, recordingType, save, SignedRecorder } from "./recorder.js";
import { Session } from "./session.js";

const RETRY_S = [1, 2, 4]; // after a connection that was lost
const MAX_IMAGE_BYTES = 20e6;

const get = (id) => document.getElementById(id);
const panel = new Panel(get("panel"));
/** What runs now; tests read it. */
export const app = { session: null, recorder: null, portrait: null, lastRecording: null };
let context = null, isBusy = false, isSaving = false;

// -- words ------------------------------------------------------------------------------------------------------------

function say(line, kind = "") {
  const message = get("message");
  message.textContent = line;
  message.dataset.kind = kind;
}

function show(state, word) {
  get("state").dataset.state = state;
  get("state").textContent = word;
}

function refresh() {
  const { session, recorder } = app;
  const isSpeaking = Boolean(session?.isSpeaking);
  get("speak").setAttribute("aria-pressed", isSpeaking);
  get("speak-label").textContent = isSpeaking ? "Stop speaking" : "Speak";
  get("speak").disabled = isBusy;
  get("interrupt").disabled = !session;
  get("end").disabled = !session || isSaving;
  get("record").disabled = !session || isSaving || !(session.records || recordingType());
  get("record").setAttribute("aria-pressed", Boolean(recorder));
  get("record-label").textContent = recorder ? "Save" : "Record";
  get("recording").hidden = !recorder;
  if (isBusy) show("busy", "Connecting");
  else if (session) show("live", isSpeaking ? "Listening" : session.source ? "Speaking" : "Idle");
  else show("ready", "Ready");
}

/** Do what a button asks for; a mistake becomes one line. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    say(error.message, "error");
  }
  refresh();
}

// -- session ----------------------------------------------------------------------------------------------------------

async function open() {
  if (app.session) return app.session;
  if (!app.portrait) throw new Error("Choose a portrait first.");
  context ??= new AudioContext({ latencyHint: "interactive" });
  isBusy = true;
  refresh();
  try {
    await context.resume(); // needs the user's press that we come from
    const session = new Session(context, get("picture"), {
      onFrame: () => {},
      onLevel: (peak) => { get("level").style.transform = `scaleX(${Math.min(1, Math.sqrt(peak))})`; },
      onSourceEnd: () => { say("The sound file has ended; the portrait idles."); refresh(); },
      onIdentity: (id) => rest(id),
      onError: (line) => say(line, "error"),
      onCaption: (who, text) => say(`${who === "user" ? "You" : "Portrait"}: ${text}`),
      onClosed: (line, isLost) => closed(session, line, isLost),
    });
    session.player.setRest(app.restImage);
    await session.open(app.portrait);
    session.player.setMuted(get("mute").getAttribute("aria-pressed") === "true");
    app.session = session;
    return session;
  } finally {
    isBusy = false;
    refresh();
  }
}

function toggleSpeak() {
  return attempt(async () => {
    if (app.session?.isSpeaking) {
      app.session.stopSource();
      say("The microphone is off; the portrait idles.");
      return;
    }
    const session = await open();
    await session.speak({ echoCancellation: get("echo").checked });
    say("Talk: the portrait answers in about a second and a half.");
  });
}

function playFile(file) {
  return attempt(async () => {
    const session = await open();
    say(`Reading ${file.name} …`);
    await session.play(file);
    say(`Speaking ${file.name} (${Math.round(session.source.durationS)} s).`);
  });
}

function interrupt() {
  if (!app.session) return;
  app.session.interrupt();
  say("Interrupted.");
  refresh();
}

async function end() {
  const loss = await finishRecording().then(() => "", ({ message }) => ` ${message}`);
  app.session?.close();
  app.session = null;
  say(`The session has ended.${loss}`);
  refresh();
}

async function closed(session, line, isLost) {
  if (session !== app.session) return;
  const wasSpeaking = session.isSpeaking;
  const loss = await finishRecording().then(() => "", ({ message }) => ` ${message}`);
  if (loss) line = line.replace(/\.?$/, `.${loss}`);
  app.session = null;
  say(line, "error");
  refresh();
  for (const wait of isLost ? RETRY_S : []) {
    say(`${line} Trying again …`, "error");
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    if (app.session || isBusy) return;
    try {
      await open();
      say(wasSpeaking ? "Connected again. Press Speak to go on." : "Connected again.");
      return;
    } catch { /* the next attempt, or the line below */ }
  }
  if (isLost) say(`${line} Press Speak to try again.`, "error");
}

// -- recording --------------------------------------------------------------------------------------------------------

async function finishRecording() {
  const { recorder } = app;
  if (!recorder) return;
  app.recorder = null;
  isSaving = true;
  refresh();
  say("Saving the recording …");
  try {
    app.lastRecording = await recorder.stop();
  } finally {
    isSaving = false;
  }
  const { name, why } = app.lastRecording;
  save(app.lastRecording);
  say(why ? `Saved ${name}: ${why}.` : `Saved ${name}.`);
}

function toggleRecording() {
  return attempt(async () => {
    if (app.recorder) await finishRecording();
    else if (app.session?.records) {
      const recorder = new SignedRecorder(app.session, () => { if (app.recorder === recorder) attempt(finishRecording); });
      app.recorder = recorder;
    } else if (app.session) app.recorder = new Recorder(app.session.player);
  });
}

// -- portraits --------------------------------------------------------------------------------------------------------

const address = (id) => `api/portraits/${encodeURIComponent(id)}.png`;

/** The portrait itself, shown where there is no frame. */
async function rest(id) {
  const image = new Image();
  image.src = address(id);
  await image.decode();
  app.restImage = image;
  if (app.session) {
    app.session.player.setRest(image);
    return;
  }
  const picture = get("picture"), side = Math.min(image.width, image.height);
  const left = (image.width - side) / 2, top = (image.height - side) / 2;
  [picture.width, picture.height] = [256, 256];
  picture.getContext("2d", { alpha: false }).drawImage(image, left, top, side, side, 0, 0, 256, 256);
}

function choose(id) {
  return attempt(async () => {
    app.portrait = id;
    if (app.session) app.session.changeIdentity(id);
    else await rest(id);
  });
}

function addChoice({ id, name }) {
  const label = document.createElement("label"), input = document.createElement("input"), image = document.createElement("img");
  label.className = "portrait";
  label.title = name;
  Object.assign(input, { type: "radio", name: "portrait", value: id, className: "hidden-input" });
  input.setAttribute("aria-label", name);
  Object.assign(image, { src: address(id), alt: "", draggable: false });
  input.addEventListener("change", () => choose(id));
  label.append(input, image);
  get("portraits").insertBefore(label, get("portraits").lastElementChild);
  return input;
}

function addUploader() {
  const label = document.createElement("label"), input = document.createElement("input");
  label.className = "portrait add";
  Object.assign(input, { type: "file", accept: "image/*", className: "hidden-input", id: "image" });
  input.addEventListener("change", () => { useImage(input.files[0]); input.value = ""; });
  label.append(input, "Add an", document.createElement("br"), "image");
  get("portraits").append(label);
}

function useImage(file) {
  return attempt(async () => {
    if (!file) return;
    if (file.size > MAX_IMAGE_BYTES) throw new Error("That image is larger than 20 MB: choose a smaller one.");
    const answer = await upload("api/portraits", file);
    const { id } = await answer.json();
    const input = addChoice({ id, name: file.name });
    input.checked = true;
    await choose(id);
  });
}

async function loadPortraits() {
  addUploader();
  const portraits = await (await request("api/portraits")).json();
  const inputs = portraits.map(addChoice);
  if (!inputs.length) return;
  inputs[0].checked = true;
  await choose(portraits[0].id);
}

// -- wiring -----------------------------------------------------------------------------------------------------------

function wireDropping() {
  let depth = 0;
  const hint = (isShown) => { get("drop").hidden = !isShown; };
  addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; hint(true); });
  addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) hint(false); });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    hint(false);
    const file = event.dataTransfer.files[0];
    if (!file) return;
    if (file.type.startsWith("image/")) useImage(file);
    else playFile(file);
  });
}

get("speak").addEventListener("click", toggleSpeak);
get("interrupt").addEventListener("click", interrupt);
get("end").addEventListener("click", end);
get("record").addEventListener("click", toggleRecording);
get("mute").addEventListener("click", () => {
  const isMuted = get("mute").getAttribute("aria-pressed") !== "true";
  get("mute").setAttribute("aria-pressed", isMuted);
  app.session?.player.setMuted(isMuted);
});
get("echo").addEventListener("change", () => {
  if (app.session?.isSpeaking) attempt(() => app.session.speak({ echoCancellation: get("echo").checked }));
});
get("speech").addEventListener("change", ({ target }) => { if (target.files[0]) playFile(target.files[0]); target.value = ""; });
addEventListener("keydown", ({ key }) => { if (key === "Escape") interrupt(); });
addEventListener("pagehide", () => app.session?.close());
// A device that slept, or a call on a phone, suspends the clock.
document.addEventListener("visibilitychange", () => { if (!document.hidden && app.session) context?.resume(); });
wireDropping();
setInterval(() => panel.update(app.session?.figures() ?? null, app.session?.chunks ?? []), 500);
attempt(loadPortraits);
refresh();
