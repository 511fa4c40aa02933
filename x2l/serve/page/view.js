// Turns and media as elements. Text enters the page as text nodes alone: nothing that a model or a file says is markup.

import { t } from "./texts.js";

export const $ = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node[name] = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function shown(item) {
  const label = `${t(item.kind)}: ${item.name}`;
  if (item.kind === "image") return element("img", { src: item.url, alt: label });
  const tag = item.kind === "video" ? "video" : "audio";
  return element(tag, { src: item.url, controls: true, preload: "metadata", playsinline: true, "aria-label": label });
}

function action(name, onclick) {
  return element("button", { type: "button", onclick }, icon(name === "edit" ? "edit" : "again"), t(name));
}

export function userArticle(turn, onedit) {
  const article = element("article", { class: "user", "aria-label": t("you") });
  if (turn.media.length) article.append(element("div", { class: "shown" }, ...turn.media.map(shown)));
  if (turn.text) article.append(element("p", { class: "bubble", dir: "auto" }, turn.text));
  article.append(element("div", { class: "actions" }, action("edit", onedit)));
  return article;
}

// The modality that reads sound, by the server's own rule.
export const hears = (reads) => reads.speech ? "speech" : reads.audio ? "audio" : null;

// What an answer cost and who read what: the line below it.
function facts(turn, model) {
  const told = [];
  const n = turn.usage?.completion_tokens ?? turn.pieces;
  if (n) told.push(t("tokens", { n }));
  const seconds = (turn.last - turn.first) / 1000;
  if (n > 1 && seconds > 0) told.push(t("speed", { speed: ((n - 1) / seconds).toFixed(1) }));
  if (turn.first) told.push(t("first", { seconds: ((turn.first - turn.began) / 1000).toFixed(2) }));
  const counts = turn.usage?.prompt_tokens_details ?? {};
  for (const [kind, field] of [["image", "image_tokens"], ["video", "video_tokens"], [hears(model.reads), "audio_tokens"]]) {
    if (kind && counts[field]) told.push(t("read_by", { kind: t(kind), path: model.reads[kind], n: counts[field] }));
  }
  if (counts.cached_tokens) told.push(t("cached", { n: counts.cached_tokens }));
  if (turn.temperature) told.push(t("sampled", { t: turn.temperature }));
  if (turn.stopped) told.push(t("stopped"));
  if (turn.finish === "length") told.push(t("cut"));
  return told;
}

// An answer's article, with set(turn) to bring it up to date.
export function answerArticle(model, onagain) {
  const text = document.createTextNode("");
  const list = element("ul", { class: "facts" });
  const problem = element("p", { class: "problem", hidden: true });
  const actions = element("div", { class: "actions" });
  const article = element("article", { class: "answer", "aria-label": model.model },
    element("p", { class: "bubble", dir: "auto" }, text), problem, list, actions);
  return {
    article,
    set(turn) {
      article.setAttribute("aria-busy", String(turn.busy));
      if (text.data !== turn.answer) text.data = turn.answer;
      if (turn.busy) return;
      problem.textContent = turn.problem;
      problem.hidden = !turn.problem;
      list.replaceChildren(...facts(turn, model).map((fact) => element("li", {}, fact)));
      actions.replaceChildren(action(turn.problem ? "retry" : "again", onagain));
    },
  };
}

export function attachedItem(item, onremove) {
  const remove = element("button", { type: "button", class: "icon", onclick: onremove, "aria-label": t("remove", { name: item.name }) },
    icon("close"));
  return element("li", {}, shown(item), remove);
}

// What the model reads and through which modules, and what it does not read.
export function readsList(reads) {
  const names = ["image", "video", "speech", "audio"];
  const icons = { image: "image", video: "video", speech: "mic", audio: "sound" };
  const sorted = [...names.filter((name) => reads[name]), ...names.filter((name) => !reads[name])];
  return sorted.map((name) => element("li", { class: reads[name] ? "yes" : "no" }, icon(icons[name]),
    element("span", {}, t(`reads_${name}`), element("small", {}, reads[name] ?? t("not_read")))));
}
