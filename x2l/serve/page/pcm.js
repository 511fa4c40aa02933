// Runs in the browser's audio thread: microphone samples -> 16-bit samples, 40 ms a message, and the rest when asked.
const SIZE = 640;

registerProcessor("pcm", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(SIZE);
    this.length = 0;
    this.port.onmessage = () => {
      this.give();
      this.port.postMessage(null);
    };
  }

  give() {
    if (this.length) this.port.postMessage(this.block.slice(0, this.length));
    this.length = 0;
  }

  process([[samples]]) {
    for (const sample of samples ?? []) {
      this.block[this.length] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767);
      this.length += 1;
      if (this.length === SIZE) this.give();
    }
    return true;
  }
});
