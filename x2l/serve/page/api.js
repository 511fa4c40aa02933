// The server's routes: /page/model, streamed /v1/chat/completions, /v1/voice.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error?.message ?? "");
}

export async function describe(key) {
  return (await request("page/model", key)).json();
}

// Yields {text}, {finish} and {usage} as they arrive. Throws Refused, TypeError (no connection), AbortError, or
// Error("broken off") where the stream ends before its end.
export async function* chat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    yield* unpack(JSON.parse(data));
  }
  throw new Error("broken off");
}

// What a chunk of an answer holds; throws Refused where it is an error.
export function* unpack(chunk) {
  if (chunk.error) throw new Refused(500, chunk.error.message);
  if (chunk.usage) yield { usage: chunk.usage };
  const choice = chunk.choices[0];
  if (choice?.delta.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
}

// Announces a spoken turn: {url}, the path of its WebSocket.
export async function voice(body, key) {
  const headers = { "Content-Type": "application/json" };
  return (await request("v1/voice", key, { method: "POST", headers, body })).json();
}

// The data of server-sent events; an event may be cut anywhere between two reads.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}
