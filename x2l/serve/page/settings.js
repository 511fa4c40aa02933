// What the person chose, kept by the browser: the key for as long as the tab lives, the rest for the next time.

import { $ } from "./view.js";

const browser = navigator.language.startsWith("zh") ? "zh" : "en";
export const settings = { language: browser, theme: "system", temperature: 0, max_tokens: 256, system: "", ...stored(localStorage, "x2l") };
export const access = { key: new URLSearchParams(location.hash.slice(1)).get("key") ?? stored(sessionStorage, "x2l-key").key ?? "" };

function stored(where, name) {
  try {
    return JSON.parse(where.getItem(name)) ?? {};
  } catch {
    return {};
  }
}

export function keep() {
  try {
    localStorage.setItem("x2l", JSON.stringify(settings));
    sessionStorage.setItem("x2l-key", JSON.stringify(access));
  } catch { /* a browser that stores nothing still chats */ }
}

export function openSettings(problem = "") {
  $("key").value = access.key;
  $("temperature").value = settings.temperature;
  $("max-tokens").value = settings.max_tokens;
  $("system").value = settings.system;
  $("dialog-error").textContent = problem;
  $("dialog-error").hidden = !problem;
  if (!$("dialog").open) $("dialog").showModal();
}

// Takes the dialog's values over, except numbers out of range, whenever it closes.
export function takeSettings() {
  const number = (id, otherwise) => $(id).value !== "" && $(id).checkValidity() ? Number($(id).value) : otherwise;
  access.key = $("key").value.trim();
  settings.temperature = number("temperature", settings.temperature);
  settings.max_tokens = number("max-tokens", settings.max_tokens);
  settings.system = $("system").value.trim();
  keep();
}
