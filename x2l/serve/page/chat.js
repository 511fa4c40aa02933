// The conversation: what is attached, asked, answered, edited.

import * as api from "./api.js";
import { fromFile, kindOf, Recorder, VOICE } from "./media.js";
import { access, keep, openSettings, settings, takeSettings } from "./settings.js";
import { setLanguage, t, TEXTS } from "./texts.js";
import { $, answersRow, attachedItem, element, hears, readsList, userArticle } from "./view.js";
import { canSpeak, Voice } from "./voice.js";
import { request } from "./wire.js";

const AGAIN_TEMPERATURE = 0.7; // a greedy answer would only repeat itself
let site = null; // what /page/model says: models, of which each answers every question, and bounds
let turns = []; // {text, media, answers}, answers: {text, busy, problem, stopped, finish, usage, began, first, last, pieces, temperature}
let attached = [];
let edited = null; // index of the turn that is being edited
let running = null; // AbortController of the answers in progress
let recorder = null;
let opening = false; // the microphone: the browser may be asking the person
let unwanted = false; // Escape, before the microphone was open

// --- what is said to the person -----------------------------------------------------------------------------------

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function say(text) {
  $("spoken").textContent = text;
}

function explain(error) {
  if (error instanceof api.Refused) {
    if (error.status === 401) return t(access.key ? "wrong_key" : "need_key");
    return error.message || t("failed", { status: error.status });
  }
  if (error.message === "broken off") return t("broken_off");
  return error.name === "Error" ? error.message : t("unreachable"); // our own words, or fetch's TypeError
}

// --- the model, and what it reads ---------------------------------------------------------------------------------

async function connect() {
  try {
    site = await api.describe(access.key);
  } catch (error) {
    notice(explain(error));
    if (error.status === 401) openSettings(explain(error));
    return false;
  }
  notice("");
  settings.max_tokens = Math.min(settings.max_tokens, site.max_new_tokens);
  $("max-tokens").max = site.max_new_tokens;
  render();
  return true;
}

const some = (test) => Boolean(site?.models.some(test)); // where one of two models cannot read a file, its answer says so
const reads = (kind) => some((model) => kind === "sound" ? hears(model.reads) : model.reads[kind]);

function missing(control) {
  if (control !== "record") return reads(control) ? "" : t(`no_${control}`);
  if (!some((model) => model.reads.speech)) return t("no_record");
  return navigator.mediaDevices && window.MediaRecorder ? "" : t("no_microphone");
}

function showControls() {
  for (const control of ["image", "video", "sound", "record"]) {
    const button = $(control === "record" ? "record" : `add-${control}`);
    const reason = site ? missing(control) : "";
    const label = t(control === "record" ? "record" : `add_${control}`);
    button.setAttribute("aria-disabled", String(Boolean(reason))); // not disabled: the reason must be reachable by keyboard
    button.setAttribute("aria-label", reason ? `${label}: ${reason}` : label);
    button.title = reason || label;
  }
}

function examples() {
  const known = settings.language === "en" || some((model) => model.chinese);
  $("tongue").hidden = known;
  const kinds = ["image", "video", "sound"].filter(reads);
  if (!kinds.length) kinds.push("text");
  const texts = kinds.flatMap((kind) => TEXTS[known ? settings.language : "en"][`${kind}_examples`]);
  return texts.map((text) => element("li", {}, element("button", { type: "button", lang: known ? null : "en", onclick: () => {
    $("question").value = text;
    fit();
    if (attached.length) send();
    else $("question").focus();
  } }, text)));
}

// --- the page -----------------------------------------------------------------------------------------------------

function render() {
  document.documentElement.dataset.theme = settings.theme;
  setLanguage(settings.language);
  showControls();
  if (recorder) $("record").setAttribute("aria-label", recordingText());
  $("welcome").hidden = turns.length > 0 || !site;
  $("clear").disabled = turns.length === 0;
  if (!site) return;
  const names = site.models.map((model) => model.model).join(t("against"));
  $("model").textContent = names;
  document.title = `X2L · ${names}`;
  document.body.classList.toggle("compares", site.models.length > 1);
  $("reads").replaceChildren(...readsList(site.models));
  $("examples").replaceChildren(...examples());
  $("log").replaceChildren(...turns.flatMap(articles));
  showAttached();
}

function articles(turn, index) {
  const mine = userArticle(turn, () => edit(index));
  const answers = answersRow(site.models, () => again(index));
  turn.show = () => answers.set(turn.answers);
  turn.show();
  return [mine, answers.row];
}

function showAttached() {
  $("attached").hidden = attached.length === 0;
  $("attached").replaceChildren(...attached.map((item) => attachedItem(item, () => {
    attached = attached.filter((other) => other !== item);
    showAttached();
    $("question").focus();
  })));
  $("editing").hidden = edited === null;
  [...$("log").children].forEach((article, i) => article.classList.toggle("replaced", edited !== null && i >= 2 * edited));
}

function showRunning() {
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
}

function fit() {
  if (CSS.supports("field-sizing", "content")) return;
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

const main = document.querySelector("main");
const atEnd = () => main.scrollHeight - main.scrollTop - main.clientHeight < 80;
const toEnd = () => { main.scrollTop = main.scrollHeight; };

// --- attaching ----------------------------------------------------------------------------------------------------

async function add(files) {
  if (!site) return;
  notice("");
  for (const file of files) {
    try {
      const kind = kindOf(file);
      if (!reads(kind)) throw new Error(missing(kind));
      attached.push(await fromFile(file, kind, site));
      say(file.name);
    } catch (error) {
      notice(error.message);
    }
  }
  showAttached();
  $("question").focus();
}

function pick(kind) {
  const reason = missing(kind);
  if (reason) return notice(reason);
  $("file").accept = { image: "image/*", video: "video/*", sound: "audio/*" }[kind];
  $("file").click();
}

async function record() {
  const button = $("record");
  const reason = missing("record");
  if (reason) return notice(reason);
  notice("");
  if (recorder) {
    const ending = recorder;
    release();
    try {
      attached.push(await ending.stop(spoken));
    } catch (error) {
      return notice(error.message);
    }
    showAttached();
    if (ending instanceof Voice) await send(ending.follows ? ending : null);
    return;
  }
  if (opening) return;
  opening = true;
  unwanted = false;
  const tick = (seconds) => {
    $("clock").textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
    if (recorder && seconds >= site.max_seconds) record();
  };
  const follows = canSpeak && site.models.length === 1; // two models take the recording as a file, when it is complete
  try {
    recorder = follows ? await Voice.start(spoken, access.key, site, tick) : await Recorder.start(site, tick);
  } catch (error) {
    return notice(error.name === "Error" ? error.message : t("microphone_refused", { error: error.name }));
  } finally {
    opening = false;
  }
  if (unwanted) return discard();
  button.setAttribute("aria-pressed", "true");
  button.setAttribute("aria-label", recordingText());
  button.title = recordingText();
  $("clock").hidden = false;
  say(recordingText());
}

const recordingText = () => t(recorder instanceof Voice ? "speaking" : "recording");

// The microphone's button as it is without a recording.
function release() {
  recorder = null;
  $("record").setAttribute("aria-pressed", "false");
  $("clock").hidden = true;
  $("clock").textContent = "";
  showControls();
  $("question").focus();
}

function discard() {
  recorder.close();
  release();
}

// --- asking -------------------------------------------------------------------------------------------------------

// The request to a model that follows what is being said; what is typed and attached belongs to it.
function spoken() {
  const asked = { text: $("question").value.trim(), media: [...attached, VOICE] };
  const { lookahead } = site.models[0];
  return request(site, [...turns.slice(0, edited ?? turns.length), asked], 0, settings.temperature, { lookahead });
}

async function send(voice = null) {
  if (running) return voice?.close();
  if (recorder instanceof Voice) return record(); // the end of speech, which sends it
  if (recorder) await record(); // what was said so far is part of the message
  const text = $("question").value.trim();
  if (!text && !attached.length) return notice(t("empty"));
  if (!site && !await connect()) return;
  if (edited !== null) turns.length = edited;
  turns.push({ text, media: attached });
  attached = [];
  edited = null;
  $("question").value = "";
  fit();
  await ask(turns.length - 1, settings.temperature, voice);
}

function again(index) {
  if (running) return;
  const failed = turns[index].answers.some((answer) => answer.problem);
  turns.length = index + 1;
  ask(index, failed ? settings.temperature : settings.temperature || AGAIN_TEMPERATURE);
}

const STREAM = { stream: true, stream_options: { include_usage: true } };

// voice: a spoken turn whose answer the server has begun already.
async function ask(index, temperature, voice = null) {
  const turn = turns[index];
  const control = running = new AbortController();
  turn.answers = site.models.map(() => ({ text: "", busy: true, problem: "", stopped: false, finish: null, usage: null, first: null,
    last: null, pieces: 0, temperature, began: performance.now() }));
  notice("");
  render();
  showRunning();
  toEnd();
  say(t("answering"));
  const asked = turns.slice(0, index + 1);
  const events = (i) => voice?.events(control.signal)
    ?? api.chat(request(site, asked, i, temperature, STREAM), access.key, control.signal);
  await Promise.all(turn.answers.map((answer, i) => receive(turn, answer, () => events(i), control.signal)));
  running = null;
  showRunning();
  say(turn.answers.map(told).join(" "));
  if (matchMedia("(pointer: fine)").matches) $("question").focus(); // on a phone the keyboard would hide the answer
}

// What is said aloud of an answer.
function told(answer, i) {
  const what = answer.problem || t("answered", { text: answer.text || t("stopped") });
  return site.models.length > 1 ? `${site.models[i].model}: ${what}` : what;
}

async function receive(turn, answer, events, signal) {
  const show = () => {
    const follow = atEnd();
    turn.show();
    if (follow) toEnd();
  };
  try {
    for await (const event of events()) {
      if (event.usage) answer.usage = event.usage;
      if (event.finish) answer.finish = event.finish;
      if (!event.text) continue;
      answer.last = performance.now();
      answer.first ??= answer.last;
      answer.pieces += 1;
      answer.text += event.text;
      show();
    }
  } catch (error) {
    if (signal.aborted) answer.stopped = true;
    else answer.problem = explain(error);
  }
  answer.busy = false;
  show();
}

function edit(index) {
  if (running) return;
  edited = index;
  $("question").value = turns[index].text;
  attached = [...turns[index].media];
  fit();
  showAttached();
  $("question").focus();
}

function cancelEdit() {
  edited = null;
  attached = [];
  $("question").value = "";
  fit();
  showAttached();
  $("question").focus();
}

function clear() {
  running?.abort();
  for (const item of turns.flatMap((turn) => turn.media)) if (!attached.includes(item)) URL.revokeObjectURL(item.url);
  turns = [];
  edited = null;
  notice("");
  render();
  say(t("cleared"));
  $("question").focus();
}

function nextTheme() {
  const themes = ["system", "light", "dark"];
  settings.theme = themes[(themes.indexOf(settings.theme) + 1) % themes.length];
  document.documentElement.dataset.theme = settings.theme;
  keep();
  say(t("theme_now", { theme: t(`theme_${settings.theme}`) }));
}

// --- events -------------------------------------------------------------------------------------------------------

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("question").oninput = fit;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) { // 229: Safari's IME
    event.preventDefault();
    send();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("dialog").open) return;
  if (recorder) discard();
  else if (opening) unwanted = true;
  else if (running) running.abort();
  else if (edited !== null) cancelEdit();
});
$("stop").onclick = () => running?.abort();
$("clear").onclick = clear;
$("edit-cancel").onclick = cancelEdit;
$("theme").onclick = nextTheme;
$("language").onclick = () => { settings.language = settings.language === "en" ? "zh" : "en"; keep(); render(); };
$("settings").onclick = () => openSettings();
$("choices").onsubmit = (event) => { event.preventDefault(); $("dialog").close(); };
$("dialog").onclose = () => {
  const before = access.key;
  takeSettings();
  if (access.key !== before) connect(); // not always: Escape would open the dialog again and again
};
for (const kind of ["image", "video", "sound"]) $(`add-${kind}`).onclick = () => pick(kind);
$("record").onclick = record;
$("file").onchange = async () => { await add([...$("file").files]); $("file").value = ""; };
$("question").onpaste = (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); add([...event.clipboardData.files]); }
};
let depth = 0; // of nested elements that a drag has entered
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => { if (carriesFiles(event)) { depth += 1; $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (carriesFiles(event) && --depth <= 0) { depth = 0; $("drop").hidden = true; } });
document.addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  add([...event.dataTransfer.files]);
});

if (location.hash) history.replaceState(null, "", location.pathname); // the key leaves the address bar
render();
keep();
connect();
