"""lmms-eval runs our models through this class: ``lmms-eval --model x2l --model_args model=tiny --tasks ...``.

Installing x2l registers it (entry point group ``lmms_eval.models``). Written for lmms-eval 0.7.3, which is imported
here alone and is no dependency of x2l.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from x2l.assistant import Assistant
from x2l.data.media import as_wav
from x2l.types import Message, Part, Sample


class X2L(lmms):  # type: ignore[misc]  # lmms-eval carries no types
    """Greedy answers of an `Assistant` to chat-style tasks with images, audio and video.

    Args:
        model: a shipped model recipe, or a path.
        assistant: a loaded one, instead.
        batch_size: requests answered at a time.
    """

    is_simple = False

    def __init__(
        self,
        model: str = "tiny",
        batch_size: int | str = 1,
        assistant: Assistant | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if device not in (None, "cpu") and assistant is None:
            raise ValueError(f"device={device!r}: name the device in the model recipe instead")
        self.assistant = assistant or Assistant.load(model)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in order."""
        asked = [self._sample(request) for request in requests]
        answers = []
        with tqdm(total=len(requests), desc="x2l") as bar:
            for decode, group in groupby(zip(asked, requests, strict=True), lambda pair: _decode(pair[1].args[2])):
                samples = list(group)
                for start in range(0, len(samples), self.batch_size):
                    batch = samples[start : start + self.batch_size]
                    texts = self.assistant.generate_text([sample for sample, _ in batch], **decode)
                    answers += [cut(text, request.args[2]) for text, (_, request) in zip(texts, batch, strict=True)]
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval's chat-style tasks generate."""
        raise NotImplementedError("x2l answers generate_until tasks; choose one of those")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("x2l answers single-round generate_until tasks; choose one of those")

    def _sample(self, request: Any) -> Sample:
        _, to_messages, _, doc_id, task, split = request.args
        messages = to_messages(self.task_dict[task][split][doc_id])
        return Sample(
            f"{task}-{doc_id}",
            tuple(Message(m["role"], tuple(self._part(content) for content in m["content"])) for m in messages),
        )

    def _part(self, content: dict[str, Any]) -> Part:
        kind = content["type"]
        if kind == "text":
            return Part("text", text=content["text"])
        source = content["url"]
        if kind == "image":
            return Part("image", bytes=_png(source))
        if kind == "audio":
            name = "speech" if "speech" in self.assistant.reads else "audio"
            return Part(name, path=source) if isinstance(source, str) else Part(name, bytes=_wav(source))
        return Part(kind, path=str(source))


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest(model_id="x2l", chat_class_path="x2l.eval.harness_lmms.X2L")


def cut(text: str, options: dict[str, Any]) -> str:
    """The text before the first stop string of ``options["until"]``."""
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0]
    return text


def _decode(options: dict[str, Any]) -> dict[str, Any]:
    """The harness's generation options as ours; sampling only where the task asks for it."""
    decode: dict[str, Any] = {"max_new_tokens": int(options.get("max_new_tokens", 128))}
    if int(options.get("num_beams") or 1) > 1:
        return {**decode, "num_beams": int(options["num_beams"])}
    if options.get("do_sample") and options.get("temperature"):
        decode |= {"temperature": float(options["temperature"]), "top_p": float(options.get("top_p") or 1.0)}
    return decode


def _png(image: Image.Image | str) -> bytes:
    if isinstance(image, str):
        with open(image, "rb") as file:
            return file.read()
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _wav(audio: dict[str, Any]) -> bytes:
    """Hugging Face's decoded audio (array, sampling_rate) as a WAV file."""
    return as_wav(np.asarray(audio["array"], np.float32), audio["sampling_rate"])
