"""Frozen transformers models as encoders: vision (ViT, CLIP, SigLIP, DINOv2, BLIP-2 ViT-g, ..) and speech (Whisper,
wav2vec 2.0, HuBERT, WavLM). Weights come from safetensors alone; a folder's own code is never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel

from x2l.encoders import ctranslate2
from x2l.llm import quiet, read_config
from x2l.types import Features
from x2l.weights import resolve

RATE = 16_000  # Hz
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

# Vision halves that AutoModel does not know by their own configuration; their weights lie under "vision_model.".
VISION_HALVES = {
    "blip_vision_model": transformers.BlipVisionModel,
    "blip_2_vision_model": transformers.Blip2VisionModel,
    "instructblip_vision_model": transformers.InstructBlipVisionModel,
}

# CTranslate2's names of Whisper's layers.
CT2_NAMES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn/qkv",
    "self_attention/linear_1": "self_attn/out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "position_encodings/encodings": "embed_positions/weight",
    "gamma": "weight",
    "beta": "bias",
}


# ---------------------------------------------------------------- vision


class VisionEncoder(nn.Module):
    """All patches (and the class token, where the model has one) of a transformers vision model.

    Args:
        model: takes ``pixel_values`` and returns ``last_hidden_state``.
        layer: ``None`` for the last hidden state, final LayerNorm included where the model applies one (BLIP-2's is
            LAVIS' ``ln_vision``); else an index into ``hidden_states``, such as -2 for the last layer but one.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, model: Any, layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        config = self.model.config
        self.width: int = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        depth = getattr(config, "num_hidden_layers", 0)
        if layer is not None and not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer={layer}: {config.model_type} has hidden states {-depth - 1} .. {depth}")

    def forward(self, pixel_values: Tensor) -> Features:
        """Processed images (N, 3, H, W) -> Features (N, F, E); a convolutional grid is read row by row."""
        pixel_values = pixel_values.to(self.model.dtype)
        if self.layer is None:
            x = self.model(pixel_values=pixel_values).last_hidden_state
        else:
            x = self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[self.layer]
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        return Features(x.float(), torch.full((len(x),), x.shape[1], device=x.device))


class ImageProcessor:
    """A transformers image processor on its PIL backend: RGB images -> ``pixel_values`` (N, 3, H, W)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return {"pixel_values": self.processor(images=list(images), return_tensors="pt")["pixel_values"]}


def build_vision(
    weights: str, layer: int | None = None, dtype: str = "float32", attn_implementation: str | None = None
) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """The vision model of a folder or hub id, or the vision half of a two-sided one, with its image processor.

    Args:
        weights: spec of a folder with ``config.json``, ``*.safetensors`` and ``preprocessor_config.json``.
        layer: see `VisionEncoder`.
        dtype: of the weights; features are float32 whatever it is.

    Raises:
        ValueError: the folder is incomplete, or holds no vision model that transformers knows.
    """
    folder = resolve(weights)
    config = _checked(weights, AutoConfig.from_pretrained, folder)
    config = getattr(config, "vision_config", config)
    half = VISION_HALVES.get(config.model_type)
    options = {"config": config, "dtype": _dtype(dtype), "attn_implementation": attn_implementation}
    if half is None:
        model = _model(weights, AutoModel, folder, **options)
    else:
        model = _model(weights, half, folder, key_mapping={"^vision_model\\.": ""}, **options)
    processor = _checked(weights, AutoImageProcessor.from_pretrained, folder, backend="pil")
    return VisionEncoder(model, layer), ImageProcessor(processor)


def sketch_vision(architecture: dict[str, Any] | Path, layer: int | None = None, dtype: str = "float32", **_: Any) -> VisionEncoder:
    """The encoder of `build_vision` on the meta device; ``architecture`` as in `x2l.llm.read_config`."""
    config = read_config(architecture)
    config = getattr(config, "vision_config", config)
    with torch.device("meta"):
        half = VISION_HALVES.get(config.model_type)
        model = AutoModel.from_config(config, dtype=_dtype(dtype)) if half is None else half(config).to(_dtype(dtype))
    return VisionEncoder(model, layer)


# ---------------------------------------------------------------- speech


class WhisperEncoder(nn.Module):
    """The encoder of Whisper (arXiv 2212.04356): one frame for every 320 samples (20 ms).

    Whisper sees windows of 30 s, zero-padded; frames of padding are cut off, windows of one waveform are joined.

    Args:
        encoder: ``transformers`` ``WhisperModel.encoder``.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.width: int = self.encoder.config.d_model
        self.window: int = self.encoder.config.max_source_positions  # frames a window

    def forward(self, input_features: Tensor, lengths: Tensor) -> Features:
        """Log-mel windows (N, W, mels, 2 * window) of waveforms with ``lengths`` (N,) frames -> Features (N, F, E)."""
        used = torch.arange(input_features.shape[1], device=lengths.device) * self.window < lengths[:, None]
        windows = self.encoder(input_features[used].to(self.encoder.dtype)).last_hidden_state
        per_item = windows.split(used.sum(1).tolist())
        frames = [w.flatten(0, 1)[:length] for w, length in zip(per_item, lengths.tolist(), strict=True)]
        return Features(nn.utils.rnn.pad_sequence(frames, batch_first=True).float(), lengths)


class WhisperProcessor:
    """Waveforms (S,) float32 at 16 kHz -> ``input_features`` (N, W, mels, T) and ``lengths`` (N,), in output frames."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.hop = 2 * extractor.hop_length  # the second convolution halves the frame rate

    def __call__(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        size = self.extractor.n_samples
        num_windows = max(1, *(-(-len(wave) // size) for wave in audio))
        windows = [wave[k * size : (k + 1) * size] for wave in map(_waveform, audio) for k in range(num_windows)]
        mels = self.extractor(windows, sampling_rate=RATE, return_tensors="pt")["input_features"]
        lengths = torch.tensor([max(1, -(-len(wave) // self.hop)) for wave in audio])
        return {"input_features": mels.unflatten(0, (len(audio), num_windows)), "lengths": lengths}


class WaveEncoder(nn.Module):
    """wav2vec 2.0 (arXiv 2006.11477) and its kin, which read the waveform itself; lengths follow their convolutions.

    A model whose first convolution normalises over time (``feat_extract_norm="group"``) sees padding, whatever the
    mask says: such models read one waveform at a time, so that no utterance depends on its batch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width: int = self.model.config.hidden_size
        self.one_by_one = self.model.config.feat_extract_norm == "group"

    def forward(self, input_values: Tensor, lengths: Tensor) -> Features:
        """Waveforms (N, S) with ``lengths`` (N,) samples -> Features (N, F, E)."""
        input_values = input_values.to(self.model.dtype)
        frames = self.model._get_feat_extract_output_lengths(lengths).long()
        if self.one_by_one:
            rows = [
                self.model(wave[None, :length]).last_hidden_state[0]
                for wave, length in zip(input_values, lengths.tolist(), strict=True)
            ]
            return Features(nn.utils.rnn.pad_sequence(rows, batch_first=True).float(), frames)
        mask = (torch.arange(input_values.shape[1], device=lengths.device) < lengths[:, None]).long()
        return Features(self.model(input_values, attention_mask=mask).last_hidden_state.float(), frames)


class WaveProcessor:
    """Waveforms (S,) float32 at 16 kHz -> normalised ``input_values`` (N, S) and ``lengths`` (N,), in samples.

    Args:
        extractor: a ``Wav2Vec2FeatureExtractor``.
        shortest: samples that the first frame sees; shorter waveforms are zero-padded to it.
    """

    def __init__(self, extractor: Any, shortest: int) -> None:
        self.extractor = extractor
        self.shortest = shortest

    def __call__(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        padded = [np.pad(wave, (0, max(0, self.shortest - len(wave)))) for wave in map(_waveform, audio)]
        waves = [
            torch.from_numpy(self.extractor(wave, sampling_rate=RATE, return_tensors="np")["input_values"][0]) for wave in padded
        ]
        lengths = torch.tensor([len(wave) for wave in waves])
        return {"input_values": nn.utils.rnn.pad_sequence(waves, batch_first=True), "lengths": lengths}


def build_speech(
    weights: str, dtype: str = "float32", attn_implementation: str | None = None
) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """The speech encoder of a folder or hub id, with its feature extractor.

    Args:
        weights: spec of a folder with ``config.json``, ``*.safetensors`` and ``preprocessor_config.json``.

    Raises:
        ValueError: the folder is incomplete, or holds no speech encoder that X2L knows.
    """
    folder = resolve(weights)
    model = _model(weights, AutoModel, folder, dtype=_dtype(dtype), attn_implementation=attn_implementation)
    extractor = _checked(weights, AutoFeatureExtractor.from_pretrained, folder)
    if model.config.model_type == "whisper":
        return WhisperEncoder(model.get_encoder()), WhisperProcessor(extractor)
    if hasattr(model.config, "feat_extract_norm"):
        return WaveEncoder(model), WaveProcessor(extractor, receptive_field(model.config))
    raise ValueError(f"{weights}: {model.config.model_type} is no speech encoder that X2L knows (Whisper, wav2vec 2.0)")


def sketch_speech(architecture: dict[str, Any] | Path, dtype: str = "float32", **_: Any) -> nn.Module:
    """The encoder of `build_speech` on the meta device; ``architecture`` as in `x2l.llm.read_config`."""
    with torch.device("meta"):
        model = AutoModel.from_config(read_config(architecture), dtype=_dtype(dtype))
    return WhisperEncoder(model.get_encoder()) if model.config.model_type == "whisper" else WaveEncoder(model)


def build_whisper_ct2(
    weights: str, sha256: str | None = None, dtype: str = "float32"
) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """Whisper's encoder from a CTranslate2 ``model.bin`` in float16 or float32.

    Args:
        weights: spec of the file, joined from its parts where a package splits it.

    Raises:
        ValueError: no such file, or its weights are not those of a Whisper encoder.
    """
    variables = ctranslate2.read(resolve(weights, sha256))
    try:
        state = whisper_state(variables)
        (width, num_mels, _), depth = state["conv1.weight"].shape, 1 + max(map(_layer_of, state))
        config = transformers.WhisperConfig(
            d_model=width,
            num_mel_bins=num_mels,
            encoder_layers=depth,
            encoder_attention_heads=int(variables["encoder/num_heads"]),
            encoder_ffn_dim=len(state["layers.0.fc1.weight"]),
            max_source_positions=len(state["embed_positions.weight"]),
        )
        encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
        encoder.load_state_dict(state)
        nn.Module.to(encoder, _dtype(dtype))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{weights}: holds no Whisper encoder ({error})") from error
    return WhisperEncoder(encoder), WhisperProcessor(transformers.WhisperFeatureExtractor(num_mels))


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """CTranslate2's names and fused projections -> the state dict of ``transformers``' Whisper encoder."""
    state: dict[str, Tensor] = {}
    for name, array in variables.items():
        if not name.startswith("encoder/") or not array.ndim:
            continue
        value = torch.from_numpy(np.array(array, np.float32))
        name = re.sub(r"layer_(\d+)/", r"layers/\1/", name.removeprefix("encoder/"))
        for old, new in CT2_NAMES.items():
            name = name.replace(old, new)
        name = name.replace("/", ".")
        if ".qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{part}_proj")] = rows
        else:
            state[name] = value
    # The key projection has no bias; CTranslate2 stores the fused one with zeros in its place.
    return {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}


def _layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else 0


def receptive_field(config: Any) -> int:
    """Samples that one frame of a wav2vec-like convolution stack sees."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


def _waveform(wave: np.ndarray) -> np.ndarray:
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"a waveform must be mono, one-dimensional and not empty, got the shape {wave.shape}")
    if not np.isfinite(wave).all():
        raise ValueError("a waveform holds NaN or infinite samples: decode or clean it again")
    return wave.astype(np.float32, copy=False)


# ---------------------------------------------------------------- loading


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _checked(name: str, load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    try:
        with quiet():
            return load(folder, **LOCAL, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"{name}: transformers {transformers.__version__} cannot load it: {error}") from error


def _model(name: str, kind: Any, folder: Path, **options: Any) -> Any:
    model, report = _checked(name, kind.from_pretrained, folder, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))  # poolers are not used
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights of {type(model).__name__} are not in it: {missing[:4]} ..")
    return model
