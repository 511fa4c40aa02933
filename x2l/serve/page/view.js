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
function facts(answer, model) {
  const told = [];
  const n = answer.usage?.completion_tokens ?? answer.pieces;
  if (n) told.push(t("tokens", { n }));
  const seconds = (answer.last - answer.first) / 1000;
  if (n > 1 && seconds > 0) told.push(t("speed", { speed: ((n - 1) / seconds).toFixed(1) }));
  if (answer.first) told.push(t("first", { seconds: ((answer.first - answer.began) / 1000).toFixed(2) }));
  const counts = answer.usage?.prompt_tokens_details ?? {};
  for (const [kind, field] of [["image", "image_tokens"], ["video", "video_tokens"], [hears(model.reads), "audio_tokens"]]) {
    if (kind && counts[field]) told.push(t("read_by", { kind: t(kind), path: model.reads[kind], n: counts[field] }));
  }
  if (counts.cached_tokens) told.push(t("cached", { n: counts.cached_tokens }));
  if (answer.temperature) told.push(t("sampled", { t: answer.temperature }));
  if (answer.stopped) told.push(t("stopped"));
  if (answer.finish === "length") told.push(t("cut"));
  return told;
}

// One model's answer, with set(answer) to bring it up to date; headed by the model's name where several answer.
function answerArticle(model, several) {
  const text = document.createTextNode("");
  const list = element("ul", { class: "facts" });
  const problem = element("p", { class: "problem", hidden: true });
  const heading = several ? [element("p", { class: "name" }, model.model)] : [];
  const article = element("article", { class: "answer", "aria-label": model.model }, ...heading,
    element("p", { class: "bubble", dir: "auto" }, text), problem, list);
  return {
    article,
    set(answer) {
      article.setAttribute("aria-busy", String(answer.busy));
      if (text.data !== answer.text) text.data = answer.text;
      if (answer.busy) return;
      problem.textContent = answer.problem;
      problem.hidden = !answer.problem;
      list.replaceChildren(...facts(answer, model).map((fact) => element("li", {}, fact)));
    },
  };
}

// The answers to one question, next to each other where several models give them; set(answers) brings them up to date.
export function answersRow(models, onagain) {
  const views = models.map((model) => answerArticle(model, models.length > 1));
  const actions = element("div", { class: "actions" });
  const grid = element("div", { class: models.length > 1 ? "answers several" : "answers" }, ...views.map((view) => view.article));
  return {
    row: element("div", { class: "row" }, grid, actions),
    set(answers) {
      views.forEach((view, i) => view.set(answers[i]));
      if (answers.some((answer) => answer.busy)) return;
      actions.replaceChildren(action(answers.some((answer) => answer.problem) ? "retry" : "again", onagain));
    },
  };
}

export function attachedItem(item, onremove) {
  const remove = element("button", { type: "button", class: "icon", onclick: onremove, "aria-label": t("remove", { name: item.name }) },
    icon("close"));
  return element("li", {}, shown(item), remove);
}

// What the models read and through which modules, and what they do not read.
export function readsList(models) {
  const names = ["image", "video", "speech", "audio"];
  const icons = { image: "image", video: "video", speech: "mic", audio: "sound" };
  const read = (name) => models.some((model) => model.reads[name]);
  const sorted = [...names.filter(read), ...names.filter((name) => !read(name))];
  const path = (model, name) => model.reads[name] ?? t("not_read");
  const each = (name) => read(name) ? models.map((model) => `${model.model}: ${path(model, name)}`) : [t("none_reads")];
  const lines = (name) => models.length > 1 ? each(name) : [path(models[0], name)];
  return sorted.map((name) => element("li", { class: read(name) ? "yes" : "no" }, icon(icons[name]),
    element("span", {}, t(`reads_${name}`), ...lines(name).map((line) => element("small", {}, line)))));
}
