"""Any image encoder in ONNX, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from x2l.encoders.preprocess import ImageProcessor
from x2l.types import Features
from x2l.weights import resolve


class OnnxEncoder(nn.Module):
    """One input of pixels, one output of features, in float32 or float16 as the graph says; runs on the CPU.

    Args:
        path: an ``.onnx`` or ``.ort`` file.
        input, output: names in the graph; by default its only input, and its first output.
        threads: threads of onnxruntime, 0 = its own choice.

    Raises:
        ValueError: no ONNX file, an unknown name, a required input besides the pixels, or an output whose shape is
            neither (N, F, E) nor (N, E, h, w) with a fixed width E.
    """

    def __init__(self, path: Path, input: str | None = None, output: str | None = None, threads: int = 0) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds share no public base class
            raise ValueError(f"{path}: onnxruntime cannot load it: {error}") from error
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = {o.name: o for o in self._session.get_outputs()}
        if (input is None and len(inputs) > 1) or (input is not None and set(inputs) != {input}):
            raise ValueError(f"{path}: has the inputs {list(inputs)}; one, for the pixels, is what X2L can feed")
        self.input = input or next(iter(inputs))
        self.output = output or next(iter(outputs))
        if self.output not in outputs:
            raise ValueError(f"{path}: has no output {output!r}; its outputs are {list(outputs)}")
        shape = outputs[self.output].shape
        width = {3: shape[-1], 4: shape[1] if len(shape) == 4 else None}.get(len(shape))
        if not isinstance(width, int):
            raise ValueError(f"{path}: {self.output} has the shape {shape}, not (N, F, E) or (N, E, h, w) with a fixed E")
        self.width: int = width
        self.dtype = np.float16 if inputs[self.input].type == "tensor(float16)" else np.float32

    def forward(self, pixel_values: Tensor) -> Features:
        """Normalised images (N, 3, H, W) -> Features (N, F, E); a grid is read row by row."""
        feed = {self.input: pixel_values.cpu().numpy().astype(self.dtype)}
        x = torch.from_numpy(self._session.run([self.output], feed)[0]).to(pixel_values.device, torch.float32)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        return Features(x, torch.full((len(x),), x.shape[1], device=x.device))


def build(
    weights: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop: float | None = None,
    sha256: str | None = None,
    input: str | None = None,
    output: str | None = None,
    threads: int = 0,
) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """An ONNX image encoder (see `OnnxEncoder`) with the preprocessing it was trained with (see `ImageProcessor`)."""
    encoder = OnnxEncoder(resolve(weights, sha256), input, output, threads)
    return encoder, ImageProcessor(size, mean, std, crop)
