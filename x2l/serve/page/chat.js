// The conversation: what is attached, asked, answered, edited.

import * as api from "./api.js";
import { fromFile, kindOf, megabytes, Recorder, wirePart } from "./media.js";
import { access, keep, openSettings, settings, takeSettings } from "./settings.js";
import { setLanguage, t, TEXTS } from "./texts.js";
import { $, answerArticle, attachedItem, element, hears, readsList, userArticle } from "./view.js";

const AGAIN_TEMPERATURE = 0.7; // a greedy answer would only repeat itself
let model = null; // what /page/model says
let turns = []; // {text, media, answer, busy, problem, stopped, finish, usage, began, first, last, pieces, temperature}
let attached = [];
let edited = null; // index of the turn that is being edited
let running = null; // AbortController of the answer in progress
let recorder = null;
let opening = false; // the microphone: the browser may be asking the person

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
    model = await api.describe(access.key);
  } catch (error) {
    notice(explain(error));
    if (error.status === 401) openSettings(explain(error));
    return false;
  }
  notice("");
  settings.max_tokens = Math.min(settings.max_tokens, model.max_new_tokens);
  $("max-tokens").max = model.max_new_tokens;
  render();
  return true;
}

const reads = (kind) => Boolean(model && (kind === "sound" ? hears(model.reads) : model.reads[kind]));

function missing(control) {
  if (control !== "record") return reads(control) ? "" : t(`no_${control}`);
  if (!model?.reads.speech) return t("no_record");
  return navigator.mediaDevices && window.MediaRecorder ? "" : t("no_microphone");
}

function showControls() {
  for (const control of ["image", "video", "sound", "record"]) {
    const button = $(control === "record" ? "record" : `add-${control}`);
    const reason = model ? missing(control) : "";
    const label = t(control === "record" ? "record" : `add_${control}`);
    button.setAttribute("aria-disabled", String(Boolean(reason))); // not disabled: the reason must be reachable by keyboard
    button.setAttribute("aria-label", reason ? `${label}: ${reason}` : label);
    button.title = reason || label;
  }
}

function examples() {
  const known = model.chinese || settings.language === "en";
  $("tongue").hidden = known;
  const kinds = [...["image", "video", "sound"].filter(reads), ...(Object.keys(model.reads).length ? [] : ["text"])];
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
  if (recorder) $("record").setAttribute("aria-label", t("recording"));
  $("welcome").hidden = turns.length > 0 || !model;
  $("clear").disabled = turns.length === 0;
  if (!model) return;
  $("model").textContent = model.model;
  document.title = `X2L · ${model.model}`;
  $("reads").replaceChildren(...readsList(model.reads));
  $("examples").replaceChildren(...examples());
  $("log").replaceChildren(...turns.flatMap(articles));
  showAttached();
}

function articles(turn, index) {
  const mine = userArticle(turn, () => edit(index));
  const answer = answerArticle(model, () => again(index));
  turn.show = () => answer.set(turn);
  turn.show();
  return [mine, answer.article];
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
  if (!model) return;
  notice("");
  for (const file of files) {
    try {
      const kind = kindOf(file);
      if (!reads(kind)) throw new Error(missing(kind));
      attached.push(await fromFile(file, kind, model));
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
    recorder = null;
    button.setAttribute("aria-pressed", "false");
    $("clock").hidden = true;
    try {
      attached.push(await ending.stop());
    } catch (error) {
      notice(error.message);
    }
    showControls();
    showAttached();
    $("question").focus();
    return;
  }
  if (opening) return;
  opening = true;
  try {
    recorder = await Recorder.start(model, (seconds) => {
      $("clock").textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
      if (recorder && seconds >= model.max_seconds) record();
    });
  } catch (error) {
    return notice(t("microphone_refused", { error: error.name }));
  } finally {
    opening = false;
  }
  button.setAttribute("aria-pressed", "true");
  button.setAttribute("aria-label", t("recording"));
  $("clock").hidden = false;
  say(t("recording"));
}

// --- asking -------------------------------------------------------------------------------------------------------

function messages(upto) {
  const talk = settings.system ? [{ role: "system", content: settings.system }] : [];
  turns.slice(0, upto + 1).forEach((turn, i) => {
    if (i < upto && !turn.answer) return; // a turn that failed left no trace in the conversation
    const content = turn.media.map(wirePart);
    if (turn.text) content.push({ type: "text", text: turn.text });
    talk.push({ role: "user", content });
    if (i < upto) talk.push({ role: "assistant", content: turn.answer });
  });
  return talk;
}

// The request's JSON; an Error says which bound it would exceed.
function request(index, temperature) {
  const talk = messages(index);
  const parts = talk.flatMap((message) => message.role === "user" ? message.content : []).filter((part) => part.type !== "text");
  if (parts.length > model.max_media) throw new Error(t("too_many", { n: parts.length, limit: model.max_media }));
  const body = JSON.stringify({ model: model.model, messages: talk, temperature, max_tokens: settings.max_tokens, stream: true,
    stream_options: { include_usage: true } });
  const { size } = new Blob([body]);
  if (size > model.max_body_bytes) {
    throw new Error(t("too_much", { size: megabytes(size), limit: megabytes(model.max_body_bytes) }));
  }
  return body;
}

async function send() {
  if (running) return;
  if (recorder) await record(); // what was said so far is part of the message
  const text = $("question").value.trim();
  if (!text && !attached.length) return notice(t("empty"));
  if (!model && !await connect()) return;
  if (edited !== null) turns.length = edited;
  turns.push({ text, media: attached });
  attached = [];
  edited = null;
  $("question").value = "";
  fit();
  await ask(turns.length - 1, settings.temperature);
}

function again(index) {
  if (running) return;
  const failed = turns[index].problem;
  turns.length = index + 1;
  ask(index, failed ? settings.temperature : settings.temperature || AGAIN_TEMPERATURE);
}

async function ask(index, temperature) {
  const turn = turns[index];
  const control = running = new AbortController();
  Object.assign(turn, { answer: "", busy: true, problem: "", stopped: false, finish: null, usage: null, first: null, last: null,
    pieces: 0, temperature, began: performance.now() });
  notice("");
  render();
  showRunning();
  toEnd();
  say(t("answering"));
  try {
    await receive(turn, request(index, temperature), control.signal);
  } catch (error) {
    if (control.signal.aborted) turn.stopped = true;
    else turn.problem = explain(error);
  }
  turn.busy = false;
  running = null;
  const follow = atEnd();
  turn.show();
  showRunning();
  if (follow) toEnd();
  say(turn.problem || t("answered", { text: turn.answer || t("stopped") }));
  if (matchMedia("(pointer: fine)").matches) $("question").focus(); // on a phone the keyboard would hide the answer
}

async function receive(turn, body, signal) {
  for await (const event of api.chat(body, access.key, signal)) {
    if (event.usage) turn.usage = event.usage;
    if (event.finish) turn.finish = event.finish;
    if (!event.text) continue;
    turn.last = performance.now();
    turn.first ??= turn.last;
    turn.pieces += 1;
    turn.answer += event.text;
    const follow = atEnd();
    turn.show();
    if (follow) toEnd();
  }
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
  if (running) running.abort();
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
