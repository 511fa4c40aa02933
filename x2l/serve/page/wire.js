// A conversation as the API takes it.

import { megabytes, wirePart } from "./media.js";
import { settings } from "./settings.js";
import { t } from "./texts.js";

// The conversation of the i-th model: turns, of which the last one asks.
function messages(list, i) {
  const talk = settings.system ? [{ role: "system", content: settings.system }] : [];
  list.forEach((turn, at) => {
    const answer = at < list.length - 1 && turn.answers[i].text;
    if (answer === "") return; // a turn that failed left no trace in the conversation
    const content = turn.media.map(wirePart);
    if (turn.text) content.push({ type: "text", text: turn.text });
    talk.push({ role: "user", content });
    if (answer) talk.push({ role: "assistant", content: answer });
  });
  return talk;
}

// The JSON of the request to a site's i-th model; an Error says which bound it would exceed.
export function request(site, list, i, temperature, more) {
  const talk = messages(list, i);
  const parts = talk.flatMap((message) => message.role === "user" ? message.content : []).filter((part) => part.type !== "text");
  if (parts.length > site.max_media) throw new Error(t("too_many", { n: parts.length, limit: site.max_media }));
  const body = JSON.stringify({ model: site.models[i].model, messages: talk, temperature, max_tokens: settings.max_tokens, ...more });
  const { size } = new Blob([body]);
  if (size > site.max_body_bytes) {
    throw new Error(t("too_much", { size: megabytes(size), limit: megabytes(site.max_body_bytes) }));
  }
  return body;
}
