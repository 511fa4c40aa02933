"""Moonshine (arXiv 2410.15608) by onnxruntime: a frozen English speech encoder, and its own decoder as an ASR peer.

A 16 kHz waveform becomes one frame of width 288 every 384 samples (24 ms, 41.7 Hz). The network normalises over the
whole waveform, so every window runs alone and without batch padding: what an utterance becomes never depends on the
batch that it travels in.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from x2l.types import Features
from x2l.weights import resolve, sha256_of

ASSETS = "pypi:moonshine-voice==0.0.65/moonshine_voice/assets/tiny-en"
SHA256 = {
    "encoder_model.ort": "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    "decoder_model_merged.ort": "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    "tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
}
RATE = 16_000  # Hz
HOP = 384  # samples a frame: the product of the strides 64, 3 and 2 of its three convolutions
RECEPTIVE = 895  # samples that the first frame sees
WIDTH = 288  # of a frame
BOS, EOS = 1, 2
TOKENS_PER_SECOND = 6.5  # the reference implementation stops its decoder here, against endless repetition


def session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU; ``threads=0`` leaves the choice to onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def windows(wave: np.ndarray, max_seconds: float) -> Iterator[np.ndarray]:
    """Cut a waveform into windows of at most ``max_seconds``, each cut at the quietest frame of the last third.

    Every cut lies on a multiple of ``HOP``, so frame f of the joined features begins at sample ``f * HOP``.
    """
    limit = int(max_seconds * RATE) // HOP
    while len(wave) > limit * HOP:
        frames = wave[: limit * HOP].reshape(limit, HOP)
        energy = np.convolve(np.square(frames).mean(1), np.ones(9), mode="same")
        first = limit * 2 // 3
        cut = (first + int(energy[first:].argmin())) * HOP
        yield wave[:cut]
        wave = wave[cut:]
    yield wave


def pad(wave: np.ndarray) -> np.ndarray:
    """Zero-pad to the shortest length that yields ``ceil(samples / HOP)`` frames, at least one."""
    num_frames = max(1, -(-len(wave) // HOP))
    return np.pad(wave, (0, num_frames * HOP + RECEPTIVE - HOP - len(wave)))


class MoonshineProcessor:
    """Waveforms, each (S,) float32 at 16 kHz, to ``waves`` (N, S_max) and ``lengths`` (N,), in samples."""

    def __call__(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        for wave in audio:
            if wave.ndim != 1:
                raise ValueError(f"a waveform must be one-dimensional (mono), got the shape {wave.shape}")
            if not np.isfinite(wave).all():
                raise ValueError("a waveform holds NaN or infinite samples: decode or clean it again")
        waves = [torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)) for wave in audio]
        lengths = torch.tensor([len(wave) for wave in waves])
        return {"waves": nn.utils.rnn.pad_sequence(waves, batch_first=True), "lengths": lengths}


class MoonshineEncoder(nn.Module):
    """``encoder_model.ort`` of Moonshine tiny; it is opened when it first hears something, so that a model that also reads
    speech starts as fast, and takes as little memory, as one that does not.

    Args:
        file: gives the path of the ORT file, fetching it if need be.
        sha256: of that file: what the encoder's features depend on.
        max_seconds: longest window that the network sees at once; its attention is quadratic in time.
        threads: threads of onnxruntime, 0 = its own choice.
    """

    seconds_per_frame = HOP / RATE
    width = WIDTH

    def __init__(self, file: Callable[[], Path], sha256: str, max_seconds: float = 20.0, threads: int = 0) -> None:
        super().__init__()
        self._file, self._threads = file, threads
        self.register_buffer("sha256", torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8))
        self.max_seconds = max_seconds

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        opened = session(self._file(), self._threads)
        width = opened.get_outputs()[0].shape[-1]
        if width != WIDTH:
            raise ValueError(f"this Moonshine encoder has frames of width {width}, expected {WIDTH}: only tiny is supported")
        return opened

    def forward(self, waves: Tensor, lengths: Tensor) -> Features:
        """Encode ``waves`` (N, S) with ``lengths`` (N,) samples to (N, F, 288), ``F = ceil(lengths / 384)``."""
        frames = [
            torch.from_numpy(self.encode(wave[:length].float().cpu().numpy()))
            for wave, length in zip(waves, lengths.tolist(), strict=True)
        ]
        x = nn.utils.rnn.pad_sequence(frames, batch_first=True).to(waves.device)
        return Features(x, torch.tensor([len(f) for f in frames], device=waves.device))

    def grow(self, wave: np.ndarray, done: list[np.ndarray]) -> Features:
        """Encode a recording (S,) that grows from call to call, each time the whole: (1, F, 288).

        Args:
            done: features of the windows that were complete before, which begin the recording whatever follows; those that
                are complete by now are added.
        """
        *complete, last = windows(wave, self.max_seconds)
        for i in range(len(done), len(complete)):
            done[i : i + 1] = [self._encode(complete[i])]  # by place: calls in two threads do not add one twice
        x = torch.from_numpy(np.concatenate([*done[: len(complete)], self._encode(last)]))[None]
        return Features(x, torch.tensor([x.shape[1]]))

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Encode one waveform (S,) to (F, 288), window by window."""
        return np.concatenate([self._encode(window) for window in windows(wave, self.max_seconds)])

    def _encode(self, window: np.ndarray) -> np.ndarray:
        values = pad(window)[None]
        feed = {"input_values": values, "attention_mask": np.ones(values.shape, np.int64)}
        return self._session.run(None, feed)[0][0]


class MoonshineTranscriber:
    """Moonshine's own greedy decoder with its key-value cache: the honest peer of our ASR model.

    Args:
        encoder, decoder, tokenizer: ``encoder_model.ort``, ``decoder_model_merged.ort`` and ``tokenizer.bin``.
        max_seconds: longest window that is transcribed at once, the texts being joined by a space.
        threads: threads of onnxruntime, 0 = its own choice.
    """

    def __init__(self, encoder: Path, decoder: Path, tokenizer: Path, max_seconds: float = 20.0, threads: int = 0) -> None:
        self.encoder = MoonshineEncoder(lambda: encoder, sha256_of(encoder), max_seconds, threads)
        self._session = session(decoder, threads)
        self._tokens = read_tokens(tokenizer)
        self._past = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values")]
        self._present = [o.name for o in self._session.get_outputs()][1:]

    def transcribe(self, wave: np.ndarray) -> str:
        """Transcribe one waveform (S,) float32 at 16 kHz."""
        texts = [self._transcribe(window) for window in windows(wave, self.encoder.max_seconds)]
        return " ".join(text for text in texts if text)

    def _transcribe(self, window: np.ndarray) -> str:
        states = self.encoder._encode(window)[None]
        mask = np.ones((1, states.shape[1] * HOP), np.int64)  # the decoder thins it out to frames itself
        feed = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in self._past}
        ids = [BOS]
        for step in range(max(1, int(len(window) / RATE * TOKENS_PER_SECOND))):
            feed |= past | {"input_ids": np.array([ids[-1:]]), "use_cache_branch": np.array([step > 0])}
            logits, *present = self._session.run(None, feed)
            token = int(logits[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
            for name, value in zip(self._present, present, strict=True):
                if step == 0 or ".decoder." in name:  # the encoder's keys and values come from the first step alone
                    past[name.replace("present", "past_key_values")] = value
        return detokenize(self._tokens, ids[1:])


def read_tokens(path: Path) -> list[bytes]:
    """Read ``tokenizer.bin``: for each token its length (one byte, or two from 128 up) and its bytes."""
    blob, at, tokens = path.read_bytes(), 0, []
    while at < len(blob):
        size, at = blob[at], at + 1
        if size >= 128:
            size, at = size - 128 + 128 * blob[at], at + 1
        tokens.append(blob[at : at + size])
        at += size
    return tokens


def detokenize(tokens: list[bytes], ids: Sequence[int]) -> str:
    """Join tokens (U+2581 marks a space) and leave out the special ones (``<s>``)."""
    text = b"".join(tokens[i] for i in ids if not tokens[i].startswith(b"<"))
    return text.decode(errors="replace").replace("\u2581", " ").strip()


def build(
    weights: str = f"{ASSETS}/encoder_model.ort",
    sha256: str | None = SHA256["encoder_model.ort"],
    max_seconds: float = 20.0,
    threads: int = 0,
    trainable: bool = False,
) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """Moonshine tiny's encoder and its processor.

    Args:
        weights: spec of an ``encoder_model.ort``, or of what stage 1 changed of it (``encoder.safetensors``), which runs in torch.
        sha256: of an ``encoder_model.ort``; give ``None`` with a spec of your own.
        max_seconds, threads: as in `MoonshineEncoder`.
        trainable: run it in torch, so that stage 1 can train it.

    Raises:
        ValueError: the weights cannot be had.
    """
    if trainable or weights.endswith(".safetensors"):
        from x2l.encoders.moonshine_torch import LazyMoonshine, TorchMoonshine, read_state  # imports this module

        path = resolve(weights, None if weights.endswith(".safetensors") else sha256)
        encoder = TorchMoonshine(read_state(path), max_seconds) if trainable else LazyMoonshine(path, max_seconds)
        return encoder, MoonshineProcessor()
    return MoonshineEncoder(
        lambda: resolve(weights, sha256), sha256 or sha256_of(resolve(weights)), max_seconds, threads
    ), MoonshineProcessor()


def build_transcriber(threads: int = 0) -> MoonshineTranscriber:
    """Moonshine tiny with its own decoder, an ASR system to compare with.

    Raises:
        ValueError: the weights cannot be had.
    """
    encoder, decoder, tokens = (resolve(f"{ASSETS}/{name}", sha) for name, sha in SHA256.items())
    return MoonshineTranscriber(encoder, decoder, tokens, threads=threads)


def decoder_weights() -> tuple[dict[str, Tensor], list[bytes]]:
    """The weights of Moonshine's decoder, dequantised to float32, under the names of transformers, and its tokens.

    Raises:
        ValueError: the weights cannot be had.
    """
    names = ("decoder_model_merged.ort", "tokenizer.bin")
    path, tokens = (resolve(f"{ASSETS}/{name}", SHA256[name]) for name in names)
    graph = load_graph(path)
    (branches,) = (node for node in graph.node if node.op_type == "If")
    first = next(a.g for a in branches.attribute if a.name == "else_branch")  # the step without a cache
    weights = {name.removesuffix("_merged_0"): tensor for name, tensor in dequantised(graph, first).items()}
    return {name: tensor for name, tensor in weights.items() if name.startswith("model.")}, read_tokens(tokens)


def load_graph(path: Path) -> Any:
    """An ORT file's ONNX graph, as it was quantised."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = f"{folder}/model.onnx"
        options.add_session_config_entry("session.save_model_format", "ONNX")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(f"{folder}/model.onnx").graph


def dequantised(graph: Any, branch: Any) -> dict[str, Tensor]:
    """Weights in float32: those of ``branch`` that are quantised, by the names of their nodes, and all others by their own."""
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in [*graph.initializer, *branch.initializer]}
    weights = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array.dtype == np.float32}
    for node in branch.node:
        for quantised in (name for name in node.input if name.endswith("_quantized") and name in arrays):
            base = quantised.removesuffix("_quantized")
            array = (arrays[quantised].astype(np.float32) - arrays[f"{base}_zero_point"]) * arrays[f"{base}_scale"]
            name = re.sub(r"/(MatMul_quant|Gather)$", "", node.name).strip("/").replace("/", ".") + ".weight"
            weights[name] = torch.from_numpy(array if node.op_type == "Gather" else array.T.copy())
    return weights
