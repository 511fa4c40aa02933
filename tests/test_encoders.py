"""Image encoders: the real loading code on tiny random models saved in the formats that hubs serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

from x2l.encoders import ENCODERS, hf
from x2l.encoders.onnx import OnnxEncoder
from x2l.encoders.preprocess import ImageProcessor

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 28, "patch_size": 14}
TEXT = {**SMALL, "vocab_size": 99}
OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model = transformers.CLIPModel(config)
    return model, model.vision_model, transformers.CLIPImageProcessorPil


def siglip():
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))
    return model, model.vision_model, transformers.SiglipImageProcessorPil


def blip2():
    qformer = {**TEXT, "encoder_hidden_size": 32}
    text = {**OPT, "vocab_size": 99, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(vision_config=VISION, qformer_config=qformer, text_config=text)
    model = transformers.Blip2ForConditionalGeneration(config)
    return model, model.vision_model, transformers.BlipImageProcessorPil


def blip():
    config = transformers.BlipConfig(vision_config=VISION, text_config={**TEXT, "encoder_hidden_size": 32})
    model = transformers.BlipForConditionalGeneration(config)
    return model, model.vision_model, transformers.BlipImageProcessorPil


def dinov2():
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
    return model, model, transformers.BitImageProcessorPil


def vit():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    return model, model.vit, transformers.ViTImageProcessorPil


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1])
    model = transformers.ResNetModel(config)
    return model, model, transformers.BitImageProcessorPil


@pytest.fixture
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 61), (90, 33))]


def save_vision(kind, folder: Path):
    torch.manual_seed(0)
    whole, half, processor = kind()
    for parameter in whole.parameters():  # BLIP-2 starts at 1e-10: no test could tell its layers apart
        nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(folder)
    processor = processor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return half.eval(), processor


@pytest.mark.parametrize("kind", [clip, siglip, blip2, blip, dinov2, vit, resnet], ids=lambda kind: kind.__name__)
def test_vision_models_load_whole_and_give_their_own_last_hidden_state(kind, tmp_path: Path, photos) -> None:
    half, own_processor = save_vision(kind, tmp_path)
    encoder, process = ENCODERS["vision"](weights=str(tmp_path))
    inputs = process(photos)
    with torch.inference_mode():
        features = encoder.eval()(**inputs)
        expected = half(pixel_values=own_processor(images=photos, return_tensors="pt")["pixel_values"])[0]
    if expected.ndim == 4:
        expected = expected.permute(0, 2, 3, 1).reshape(len(photos), -1, expected.shape[1])
    torch.testing.assert_close(features.x, expected, rtol=0, atol=1e-5)
    assert features.x.shape == (2, features.lengths[0], encoder.width)
    assert expected.std() > 0.01
    assert not torch.allclose(features.x[0], features.x[1])


def test_vision_layer_selects_a_hidden_state(tmp_path: Path, photos) -> None:
    half, _ = save_vision(clip, tmp_path)
    encoder, process = hf.build_vision(str(tmp_path), layer=-2)
    inputs = process(photos)
    with torch.inference_mode():
        expected = half(**inputs, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(encoder.eval()(**inputs).x, expected)
    with pytest.raises(ValueError, match="layer=3"):
        hf.build_vision(str(tmp_path), layer=3)


def test_vision_errors_name_the_folder(tmp_path: Path) -> None:
    save_vision(vit, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=tmp_path.name):
        hf.build_vision(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        hf.build_vision(str(empty))


def test_missing_weights_are_refused_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_vision(vit, tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    gone = next(key for key in state if "layernorm" in key)
    del state[gone]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of ViTModel are not in it"):
        hf.build_vision(str(tmp_path))


def test_half_precision_weights_give_float32_features(tmp_path: Path, photos) -> None:
    save_vision(vit, tmp_path)
    encoder, process = hf.build_vision(str(tmp_path), dtype="bfloat16")
    assert next(encoder.parameters()).dtype is torch.bfloat16
    assert encoder(**process(photos)).x.dtype is torch.float32
    with pytest.raises(ValueError, match="dtype='fp8'"):
        hf.build_vision(str(tmp_path), dtype="fp8")


# ---------------------------------------------------------------- EfficientNet-lite0


@pytest.fixture(scope="module")
def efficientnet_weights(tmp_path_factory) -> str:
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("efficientnet") / "lite0.pth"
    torch.save(EfficientNet.from_name("efficientnet-lite0").state_dict(), path)
    return str(path)


def test_efficientnet_reads_its_grid_row_by_row(efficientnet_weights: str, photos) -> None:
    encoder, process = ENCODERS["efficientnet_lite0"](weights=efficientnet_weights, sha256=None)
    inputs = process(photos)
    with torch.inference_mode():
        features = encoder.eval()(**inputs)
        grid = encoder.network.extract_features(inputs["pixel_values"])
    assert features.x.shape == (2, 49, 1280)
    assert features.lengths.tolist() == [49, 49]
    torch.testing.assert_close(features.x[1, 2 * 7 + 3], grid[1, :, 2, 3])


def test_efficientnet_preprocessing_by_hand(efficientnet_weights: str, photos) -> None:
    _, process = ENCODERS["efficientnet_lite0"](weights=efficientnet_weights, sha256=None)
    pixels = np.asarray(photos[0].resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float64)
    expected = (pixels / 255 - 0.498) / 0.502
    got = process(photos)["pixel_values"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_other_weights_are_no_efficientnet(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is no EfficientNet-lite0"):
        ENCODERS["efficientnet_lite0"](weights=str(tmp_path / "w.pth"), sha256=None)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    torch.save({"weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        ENCODERS["efficientnet_lite0"](weights=str(tmp_path / "w.pth"), sha256=None)
    assert not marker.exists()


# ---------------------------------------------------------------- ResNet-50


def keras_resnet50(seed: int) -> dict[str, torch.Tensor]:
    """Random weights under Keras' names, in the order of its file."""
    layers: dict[str, tuple[int, ...]] = {"conv1": (7, 7, 3, 64)}
    width = 64
    for stage, (depth, inner) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in "abcdef"[:depth]:
            name = f"res{stage + 2}{block}_branch"
            layers |= {f"{name}2a": (1, 1, width, inner), f"{name}2b": (3, 3, inner, inner), f"{name}2c": (1, 1, inner, 4 * inner)}
            if block == "a":
                layers[f"{name}1"] = (1, 1, width, 4 * inner)
            width = 4 * inner
    rng = torch.Generator().manual_seed(seed)
    weights = {"fc1000/kernel": torch.zeros(2048, 1000), "fc1000/bias": torch.zeros(1000)}
    for name, shape in layers.items():
        out, norm = shape[-1], "bn_conv1" if name == "conv1" else name.replace("res", "bn")
        weights[f"{name}/kernel"] = torch.randn(shape, generator=rng) * (2 / (shape[0] * shape[1] * shape[2])) ** 0.5
        weights[f"{name}/bias"] = torch.randn(out, generator=rng) * 0.1
        for field in ("gamma", "beta", "moving_mean", "moving_variance"):
            weights[f"{norm}/{field}"] = torch.rand(out, generator=rng) * 0.2 + (0.1 if field in ("beta", "moving_mean") else 0.9)
    order = ("gamma", "beta", "moving_mean", "moving_variance", "kernel", "bias")
    return {key: weights[key] for key in sorted(weights, key=lambda k: (k.split("/")[0], order.index(k.split("/")[1])))}


def keras_forward(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ResNet-50 by its layers' names, as Keras runs it."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        norm = "bn_conv1" if name == "conv1" else name.replace("res", "bn")
        gamma, beta, mean, var = (w[f"{norm}/{field}"] for field in ("gamma", "beta", "moving_mean", "moving_variance"))
        y = F.conv2d(x, w[f"{name}/kernel"].permute(3, 2, 0, 1), w[f"{name}/bias"], stride, padding)
        return F.batch_norm(y, mean, var, gamma, beta, eps=1e-3)

    x = F.max_pool2d(F.pad(conv(x, "conv1", 2, 3).relu(), (1, 1, 1, 1)), 3, 2)
    for stage, depth in enumerate((3, 4, 6, 3), 2):
        for block in "abcdef"[:depth]:
            name, stride = f"res{stage}{block}_branch", 2 if block == "a" and stage > 2 else 1
            y = conv(conv(x, f"{name}2a", stride).relu(), f"{name}2b", padding=1).relu()
            x = (conv(y, f"{name}2c") + (conv(x, f"{name}1", stride) if block == "a" else x)).relu()
    return x


def test_resnet_is_the_network_that_keras_names_describe(tmp_path: Path, photos) -> None:
    weights = keras_resnet50(seed=0)
    torch.cat([tensor.flatten() for tensor in weights.values()]).numpy().tofile(tmp_path / "w.bin")
    encoder, process = ENCODERS["resnet50"](weights=str(tmp_path / "w.bin"), sha256=None)
    pixels = np.asarray(photos[0].resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    by_hand = torch.from_numpy(pixels[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)).permute(2, 0, 1)
    inputs = process(photos)
    torch.testing.assert_close(inputs["pixel_values"][0], by_hand, atol=1e-3, rtol=0)
    with torch.inference_mode():
        features = encoder.eval()(**inputs)
        grid = keras_forward(weights, inputs["pixel_values"])
    assert features.x.shape == (2, 49, 2048)
    torch.testing.assert_close(features.x[1, 2 * 7 + 3], grid[1, :, 2, 3], rtol=1e-3, atol=1e-3 * float(grid.std()))


def test_other_weights_are_no_resnet(tmp_path: Path) -> None:
    np.zeros(7, np.float32).tofile(tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"w\.bin: is no ResNet-50, it holds 7 numbers, not 25,"):
        ENCODERS["resnet50"](weights=str(tmp_path / "w.bin"), sha256=None)


# ---------------------------------------------------------------- ONNX


def onnx_graph(path: Path, flat: bool, extra_input: bool = False) -> np.ndarray:
    """A graph of one 14 x 14 convolution with stride 14; its kernel is returned."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel = np.random.default_rng(1).normal(size=(8, 3, 14, 14)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["pixels", "kernel"], ["grid"], strides=[14, 14])]
    outputs = [helper.make_tensor_value_info("grid", TensorProto.FLOAT, ["n", 8, 2, 2])]
    weights = [numpy_helper.from_array(kernel, "kernel")]
    if flat:
        weights.append(numpy_helper.from_array(np.array([0, 8, 4]), "shape"))
        nodes.append(helper.make_node("Reshape", ["grid", "shape"], ["rows"]))
        nodes.append(helper.make_node("Transpose", ["rows"], ["patches"], perm=[0, 2, 1]))
        outputs.append(helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["n", 4, 8]))
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 28, 28])]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n"]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return kernel


@pytest.mark.parametrize(("flat", "output"), [(False, None), (True, "patches"), (True, None)])
def test_onnx_encoder_equals_torch(flat: bool, output: str | None, tmp_path: Path, photos) -> None:
    path = tmp_path / "encoder.onnx"
    kernel = onnx_graph(path, flat)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    encoder, process = ENCODERS["onnx"](weights=str(path), size=28, mean=mean, std=std, output=output)
    inputs = process(photos)
    features = encoder(**inputs)
    expected = nn.functional.conv2d(inputs["pixel_values"], torch.from_numpy(kernel), stride=14)
    torch.testing.assert_close(features.x, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert encoder.width == 8
    assert features.lengths.tolist() == [4, 4]


def test_onnx_errors_name_what_the_graph_has(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    onnx_graph(path, flat=True)
    with pytest.raises(ValueError, match=r"no output 'tokens'; its outputs are \['grid', 'patches'\]"):
        OnnxEncoder(path, output="tokens")
    with pytest.raises(ValueError, match=r"has the inputs \['pixels'\]"):
        OnnxEncoder(path, input="image")
    onnx_graph(path, flat=True, extra_input=True)
    with pytest.raises(ValueError, match=r"\['pixels', 'mask'\]"):
        OnnxEncoder(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="onnxruntime cannot load it"):
        OnnxEncoder(path)


@pytest.mark.parametrize("kind", [clip, dinov2], ids=lambda kind: kind.__name__)
def test_centre_crop_agrees_with_transformers(kind, photos) -> None:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    theirs = kind()[2](**size)
    ours = ImageProcessor(28, theirs.image_mean, theirs.image_std, crop=28 / 32)
    expected = theirs(images=photos, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours(photos)["pixel_values"], expected, rtol=0, atol=0.03)


# ---------------------------------------------------------------- timm and open_clip


@pytest.mark.parametrize(("name", "extra"), [("timm", "timm"), ("open_clip", "open-clip")])
def test_a_missing_extra_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"pip install 'x2l\[{extra}\]'"):
        ENCODERS[name](weights="anything")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_timm_model_gives_its_own_features(name: str, tmp_path: Path, photos) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    encoder, process = ENCODERS["timm"](weights=str(tmp_path))
    inputs = process(photos)
    with torch.inference_mode():
        features, expected = encoder.eval()(**inputs), model.forward_features(inputs["pixel_values"])
    if expected.ndim == 4:
        expected = expected if name.startswith("swin") else expected.permute(0, 2, 3, 1)
        expected = expected.reshape(2, -1, encoder.width)
    torch.testing.assert_close(features.x, expected)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        ENCODERS["timm"](weights=str(tmp_path))


def test_open_clip_tower_gives_its_normalised_patches(tmp_path: Path, photos) -> None:
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vision = {"image_size": 56, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14}
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config).eval()
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder, process = ENCODERS["open_clip"](weights=str(tmp_path))
    inputs = process(photos)
    with torch.inference_mode():
        features = encoder.eval()(**inputs)
        hidden = model.visual.forward_intermediates(
            inputs["pixel_values"], indices=1, intermediates_only=True, normalize_intermediates=True, output_fmt="NLC"
        )["image_intermediates"][0]
    torch.testing.assert_close(features.x, hidden)
    assert features.x.shape == (2, 16, encoder.width)
