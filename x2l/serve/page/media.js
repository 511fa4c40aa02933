// Files from the disk, the clipboard and the microphone -> items {kind, name, blob, url, data}.

import { t } from "./texts.js";

const READABLE = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]; // by the server, as they are
const LONGEST_SIDE = 2048; // of a photo that is sent: encoders see a few hundred pixels of it
const KINDS = { image: "image", video: "video", audio: "sound" };
export const megabytes = (bytes) => (bytes / 2 ** 20).toFixed(1);

export function kindOf(file) {
  const kind = KINDS[file.type.split("/")[0]];
  if (!kind) throw new Error(t("unknown_kind", { name: file.name }));
  return kind;
}

export async function fromFile(file, kind, limits) {
  const blob = kind === "image" ? await photo(file) : file;
  return item(kind, file.name, blob, limits);
}

export async function item(kind, name, blob, limits) {
  if (blob.size > limits.max_file_bytes) {
    throw new Error(t("too_large", { name, size: megabytes(blob.size), limit: megabytes(limits.max_file_bytes) }));
  }
  return { kind, name, blob, url: URL.createObjectURL(blob), data: await dataUrl(blob) };
}

// Large photos are made smaller, and what only the browser can read (HEIC, AVIF, SVG) becomes a JPEG.
async function photo(file) {
  let bitmap;
  try {
    bitmap = await decoded(file);
  } catch {
    throw new Error(t("broken_image", { name: file.name }));
  }
  const scale = LONGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && READABLE.includes(file.type)) return file;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * Math.min(1, scale)));
  canvas.height = Math.max(1, Math.round(bitmap.height * Math.min(1, scale)));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // as the server lays transparency over white
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// An <img> reads more than createImageBitmap does (SVG), and turns by EXIF.
async function decoded(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return image;
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^,]*,/, `data:${plainType(blob)};base64,`));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// "audio/webm;codecs=opus" and exotic types: the server looks into the file, not at its label.
function plainType(blob) {
  return /^[\w.+-]+\/[\w.+-]+/.exec(blob.type)?.[0] ?? "application/octet-stream";
}

export const VOICE = { kind: "voice" }; // where a recording will stand that is still being made

export function wirePart(item) {
  if (item === VOICE) return { type: "voice" };
  const type = { image: "image_url", video: "video_url", sound: "audio_url" }[item.kind];
  return { type, [type]: { url: item.data } };
}

// A recording in progress. stop() gives its item; ontick is called with the seconds so far.
export class Recorder {
  static async start(limits, ontick) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
    return new Recorder(stream, limits, ontick);
  }

  constructor(stream, limits, ontick) {
    this.stream = stream;
    this.limits = limits;
    this.pieces = [];
    this.recorder = new MediaRecorder(stream);
    this.recorder.ondataavailable = (event) => event.data.size && this.pieces.push(event.data);
    this.recorder.start();
    const begun = performance.now();
    ontick(0);
    this.timer = setInterval(() => ontick((performance.now() - begun) / 1000), 250);
  }

  close() {
    clearInterval(this.timer);
    for (const track of this.stream.getTracks()) track.stop();
  }

  async stop() {
    await new Promise((resolve) => {
      this.recorder.onstop = resolve;
      this.recorder.stop();
    });
    this.close();
    const blob = new Blob(this.pieces, { type: this.recorder.mimeType });
    if (!blob.size) throw new Error(t("silent_recording"));
    return item("sound", t("speech"), blob, this.limits);
  }
}
