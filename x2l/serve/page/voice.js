// A spoken turn: the microphone's samples go to the server while the person speaks, so that it can answer at once.

import * as api from "./api.js";
import { item } from "./media.js";
import { t } from "./texts.js";

const RATE = 16000;
const PATIENCE = 5000; // ms until a server that does not react to the end gets the recording as a file
export const canSpeak = Boolean(window.AudioWorkletNode && window.WebSocket && navigator.mediaDevices);

export class Voice {
  // ask gives the request as it would be now, {"type": "voice"} where the recording will stand. ontick is called with the
  // seconds so far.
  static async start(ask, key, limits, ontick) {
    const body = ask();
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
    const voice = new Voice(stream, limits, ontick);
    try {
      await voice.listen();
    } catch (error) {
      voice.close();
      throw error;
    }
    voice.connect(body, key);
    voice.body = body;
    return voice;
  }

  constructor(stream, limits, ontick) {
    this.stream = stream;
    this.limits = limits;
    this.context = new AudioContext({ sampleRate: RATE });
    this.samples = []; // blocks
    this.sent = 0; // of them
    this.arrived = []; // frames of the server, then null
    this.follows = false; // whether the server answers what was said; else it must be sent as a file, like any other
    this.begun = performance.now();
    ontick(0);
    this.timer = setInterval(() => ontick((performance.now() - this.begun) / 1000), 250);
  }

  async listen() {
    await this.context.audioWorklet.addModule("page/pcm.js");
    this.node = new AudioWorkletNode(this.context, "pcm", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    this.node.port.onmessage = ({ data }) => {
      if (!data) return this.flushed();
      this.samples.push(data);
      this.forward();
    };
    this.context.createMediaStreamSource(this.stream).connect(this.node);
  }

  async connect(body, key) {
    try {
      const { url } = await api.voice(body, key);
      if (this.closed) return;
      this.socket = new WebSocket(new URL(url, location.href.replace(/^http/, "ws")));
    } catch {
      return this.take(null); // the request with the file will tell the person why
    }
    this.socket.onopen = () => this.forward();
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    this.socket.onclose = () => this.take(null);
  }

  // Sends what has not been sent yet.
  forward() {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    while (this.sent < this.samples.length) this.socket.send(this.samples[this.sent++]);
    if (this.ended) this.socket.send(JSON.stringify({ type: "end" }));
  }

  take(frame) {
    this.arrived.push(frame);
    this.wake?.();
  }

  async next() {
    while (!this.arrived.length) await new Promise((resolve) => { this.wake = resolve; });
    return this.arrived.shift();
  }

  // The end of speech: the recording. The server follows if it was asked what would be asked now.
  async stop(ask) {
    const same = ask() === this.body;
    clearInterval(this.timer);
    await new Promise((resolve) => {
      this.flushed = resolve;
      this.node.port.postMessage(null);
    });
    this.release();
    this.ended = true;
    if (!same) this.close(); // before it is told of the end, the server would answer what is not asked any more
    this.forward();
    const first = same && await Promise.race([this.next(), new Promise((resolve) => { setTimeout(resolve, PATIENCE); })]);
    this.follows = first?.type === "end";
    if (this.follows) return this.recording(first.samples);
    this.close();
    return this.recording(Infinity);
  }

  async recording(samples) {
    const blob = new Blob(this.samples);
    if (!blob.size) throw new Error(t("silent_recording"));
    return item("sound", t("speech"), wav(blob.slice(0, 2 * samples)), this.limits);
  }

  // What `chat` in api.js yields, of the answer to what was said.
  async* events(signal) {
    signal.addEventListener("abort", () => this.close());
    for (let chunk = await this.next(); chunk; chunk = await this.next()) {
      yield* api.unpack(chunk);
      if (chunk.usage) return;
    }
    signal.throwIfAborted();
    throw new Error("broken off");
  }

  release() {
    clearInterval(this.timer);
    for (const track of this.stream.getTracks()) track.stop();
    this.context.close();
  }

  close() {
    this.closed = true;
    if (!this.ended) this.release();
    this.socket?.close();
  }
}

// The very file that the server makes of the same samples, so that later turns find it known where it was read whole.
function wav(samples) {
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + samples.size, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true); // PCM
  head.setUint16(22, 1, true); // one channel
  head.setUint32(24, RATE, true);
  head.setUint32(28, 2 * RATE, true); // bytes a second
  head.setUint16(32, 2, true); // bytes a sample
  head.setUint16(34, 16, true); // bits
  text(36, "data");
  head.setUint32(40, samples.size, true);
  return new Blob([head, samples], { type: "audio/wav" });
}
