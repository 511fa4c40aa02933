"""x2l info: sizes against published counts, formulas against PyTorch's counter on small models and a published figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from x2l import flops
from x2l.architectures import ARCHITECTURES, ChatGLMShape
from x2l.build import build, sketch
from x2l.cli import app
from x2l.config import ModelConfig, load_model_config, load_train_config
from x2l.encoders.conformer import ConformerEncoder
from x2l.encoders.hf import sketch_speech, sketch_vision
from x2l.info import info, show, trained_parameters
from x2l.interfaces.adapter import Adapter
from x2l.interfaces.cformer import CFormer
from x2l.interfaces.qformer import QFormer
from x2l.llm import sketch_llm
from x2l.modalities.speech import FrozenListener
from x2l.modalities.video import FrameQFormer, Frames
from x2l.model import cache_name
from x2l.types import Features


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counted(run: Any) -> int:
    """PyTorch's own count; it sees inside attention where that runs as plain matrix products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(("name", "published"), [("Qwen/Qwen3-8B", 8_190_735_360), ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096)])
def test_llms_have_their_published_size(name: str, published: int) -> None:
    model = sketch_llm(ARCHITECTURES[name], torch.bfloat16)
    assert size(model) == published
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Salesforce/blip2-itm-vit-g", 985_952_256),
        ("google/siglip2-so400m-patch14-384", 428_225_600),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", 303_129_600),
    ],
)
def test_vision_encoders_have_their_published_size(name: str, published: int) -> None:
    assert size(sketch_vision(ARCHITECTURES[name])) == published


def test_whisper_has_its_published_size() -> None:
    from transformers import WhisperForConditionalGeneration

    name = "openai/whisper-large-v3-turbo"
    with torch.device("meta"):
        whole = WhisperForConditionalGeneration(AutoConfig.for_model(**ARCHITECTURES[name]))
    assert size(whole) == 808_878_080
    assert size(sketch_speech(ARCHITECTURES[name])) == size(whole.model.encoder)


def test_chatglm_has_its_published_size_and_operations() -> None:
    """6,173,286,400 parameters, and 1,587.66 GFLOPs for 128 tokens as the profiler calflops publishes them."""
    model = ChatGLMShape()
    assert size(model) == 6_173_286_400
    assert flops.llm(model, 128, 128) == pytest.approx(1587.66e9, rel=5e-4)


def test_the_paper_has_seven_point_six_billion_parameters() -> None:
    """Appendix A.3: 7.6 billion with all encoders; image and video share ViT-g, each has its Q-Former and adapter."""
    told = info("models/paper.yaml", ["llm.spec=hf:zai-org/chatglm-6b"])
    assert told.parts[0].parameters == 6_173_286_400
    assert told.parameters == 7_580_734_721
    trained, adapter = dict(told.trained), 768 * 4096 + 4096
    assert trained["paper/stage2_image"] == trained["paper/stage2_video"] == 105_165_056 + adapter
    assert trained["paper/stage3"] == 3 * adapter
    assert trained["paper/stage1_asr"]


@pytest.mark.parametrize("name", ["paper", "qwen3_siglip2_whisper", "qwen3_dinov3_whisper"])
def test_shipped_stacks_fit_together(name: str) -> None:
    """Every interface ends in the LLM's width, and every part has its operations counted."""
    model, _ = sketch(load_model_config(name))
    llm: Any = model.llm
    modalities: Any = model.modalities.values()
    width = llm.get_input_embeddings().weight.shape[1]
    assert all(modality.interface[-1].linear.out_features == width for modality in modalities)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(cost.training for cost in info(name).costs)


def test_a_sketch_is_the_model(llm_folder: Path) -> None:
    """Names and shapes of the meta model are those of the built one."""
    config = ModelConfig.model_validate(tiny_model(llm_folder))
    built, (drawn, _) = build(config).model, sketch(config)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in drawn.named_parameters()}


# ---------------------------------------------------------------- what a stage trains


def write(path: Path, **recipe: Any) -> str:
    path.write_text(yaml.safe_dump({"data": [{"path": "x.tar", "tasks": {"caption": {}}, "licence": "none"}], **recipe}))
    return str(path)


def test_trained_parameters(llm_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(llm_folder)
    drawn, _ = sketch(ModelConfig.model_validate(model))
    former, adapter = drawn.modalities["image"].get_submodule("interface").children()
    for stage, globs, expected in (
        ("xllm", {"modalities.image.interface.*": 1e-4}, size(former) + size(adapter)),
        ("xllm", {"modalities.image.interface.1.*": 1e-4}, size(adapter)),
        ("words", {"interface.*": 1e-4, "log_scale": 1e-4, "bias": 1e-4}, size(former) + size(adapter) + 1),
    ):
        cfg = load_train_config(write(tmp_path / "r.yaml", stage=stage, model=model, trainable=globs, steps=1))
        assert trained_parameters(cfg, drawn) == expected
    cfg = load_train_config(write(tmp_path / "r.yaml", model=model, trainable={"nothing.*": 1.0}, steps=1))
    with pytest.raises(ValueError, match="matches no parameter"):
        trained_parameters(cfg, drawn)


def test_the_command(llm_folder: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", model=tiny_model(llm_folder), trainable={"modalities.image.*": 1e-4}, steps=1)
    result = CliRunner().invoke(app, ["info", recipe])
    assert result.exit_code == 0, result.exception
    assert "billion parameters" in result.output
    page, told = io.StringIO(), info(recipe)
    show(told, Console(file=page, width=200))
    text = page.getvalue()
    assert f"{told.parameters:,}" in text
    assert f"{told.trained[0].parameters:,}" in text
    assert "192 FLOP" in text  # 4 patches x 3 colours x 8 channels x 2, counted by running this encoder
    with pytest.raises(ValueError, match="no recipe 'papr'"):
        info("papr")


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("heads", [2, 4])
def test_llm_operations(heads: int) -> None:
    config = AutoConfig.for_model(
        "qwen3", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(1, 11, dtype=torch.long)
    assert flops.llm(model, 11, 11) == pytest.approx(counted(lambda: model(input_ids=ids, use_cache=False)), rel=0.01)
    past = model(input_ids=ids)[cache_name(model)]
    step = counted(lambda: model(input_ids=ids[:, :1], **{cache_name(model): past}))
    assert flops.llm(model, 1, 1, past=11) == pytest.approx(step, rel=0.01)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize("kind", ["clip_vision_model", "blip_2_vision_model", "dinov2", "dinov3_vit", "vit", "siglip_vision_model"])
def test_vision_operations(kind: str) -> None:
    encoder = sketch_vision({"model_type": kind, **SMALL})
    pixels = torch.zeros(1, 3, 32, 32, device="meta")
    told = flops.vision(encoder, flops.Item(0.0))
    assert told.length == encoder(pixels).x.shape[1]
    pooling = 0.15 if kind == "siglip_vision_model" else 0.01  # its pooling head reads all patches once more
    assert told.flops == pytest.approx(counted(lambda: encoder(pixels)), rel=pooling)


def test_whisper_operations() -> None:
    encoder: Any = sketch_speech(
        {"model_type": "whisper", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_layers": 1, "decoder_attention_heads": 4, "num_mel_bins": 16, "max_source_positions": 50}
    )  # fmt: skip
    mels = torch.zeros(1, 16, 100, device="meta")
    one, two = flops.whisper(encoder, flops.Item(1.0)), flops.whisper(encoder, flops.Item(1.5))
    assert one.flops == pytest.approx(counted(lambda: encoder.encoder(mels)), rel=0.01)
    assert (one.length, two.length) == (50, 75)
    assert two.flops == 2 * one.flops


def test_conformer_operations() -> None:
    encoder = ConformerEncoder(
        16, channels=4, width=32, ffn_width=64, num_heads=4, kernel=7, num_blocks=4, pool_after=(1, 3)
    ).eval()
    frames = 98  # one second of sound
    told = flops.conformer(encoder, flops.Item(1.0))
    features = encoder(torch.zeros(1, frames, 16), torch.tensor([frames]))
    assert told.length == int(features.lengths)
    assert told.flops == pytest.approx(counted(lambda: encoder(torch.zeros(1, frames, 16), torch.tensor([frames]))), rel=0.01)


@pytest.mark.parametrize(
    "layer",
    [
        QFormer(24, width=32, depth=4, heads=4, num_queries=6, cross_every=2),
        QFormer(24, width=32, depth=3, heads=4, num_queries=6, cross_every=1, pre_norm=True, vocab_size=9),
        CFormer(24, width=32, depth=2, heads=4),
        Adapter(24, 40),
    ],
    ids=["qformer", "qformer with text", "cformer", "adapter"],
)
def test_interface_operations(layer: nn.Module) -> None:
    layer.eval()
    item = Features(torch.randn(1, 13, 24), torch.tensor([13]))
    told = flops.interface([layer], 13, flops.Item(1.0))
    assert told is not None
    assert told.length == layer(item).x.shape[1]
    assert told.flops == pytest.approx(counted(lambda: layer(item)), rel=0.01)


@pytest.mark.parametrize("mean_frames", [False, True])
def test_video_operations(mean_frames: bool) -> None:
    """Frames are pictures: the encoder and the Q-Former run once for each."""
    encoder = Frames(sketch_vision({"model_type": "clip_vision_model", **SMALL}))
    former = FrameQFormer(32, mean_frames=mean_frames, width=32, depth=2, heads=4, num_queries=6).eval()
    told = flops.encoder(encoder, flops.Item(0.0, 5), dict)
    assert told is not None
    pixels = torch.zeros(5, 3, 32, 32, device="meta")
    assert told.flops == pytest.approx(counted(lambda: encoder(torch.tensor([5]), torch.arange(5), pixel_values=pixels)), rel=0.01)
    item = Features(torch.randn(1, 5, 17, 32), torch.tensor([5]))
    heard = flops.interface([former], told.length, flops.Item(0.0, 5))
    assert heard is not None
    assert heard.length == former(item).x.shape[1]
    assert heard.flops == pytest.approx(counted(lambda: former(item)), rel=0.01)


@pytest.mark.parametrize(("stride", "blocks", "parts"), [(1, 0, 1), (2, 2, 1), (2, 1, 3)])
def test_listener_operations(stride: int, blocks: int, parts: int) -> None:
    listener = FrozenListener(24, width=32, stride=stride, num_blocks=blocks, ffn_width=64, num_heads=4, parts=parts)
    item = Features(torch.randn(1, 40, 24), torch.tensor([40]))
    told = flops.interface([listener], 40, flops.Item(2.0))
    assert told is not None
    assert told.flops == pytest.approx(counted(lambda: listener(item)), rel=0.02)  # what fires costs more or less


def test_what_has_no_formula_is_not_counted() -> None:
    assert flops.interface([Adapter(8, 8), nn.Linear(8, 8)], 3, flops.Item(1.0)) is None
    assert flops.encoder(nn.Linear(8, 8, device="meta"), flops.Item(1.0), dict) is None


def test_a_convolutional_encoder_is_counted_by_running_it() -> None:
    class Grid(nn.Module):
        width = 5

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 4, stride=4)

        def forward(self, pixels: torch.Tensor) -> Features:
            x = self.conv(pixels).flatten(2).transpose(1, 2)
            return Features(x, torch.tensor([x.shape[1]]))

    told = flops.encoder(Grid(), flops.Item(0.0), lambda: {"pixels": torch.zeros(1, 3, 16, 16)})
    assert told == (2 * 16 * 5 * 3 * 16, 16)


def test_a_stage_that_starts_from_a_trained_encoder_needs_no_training_to_be_described() -> None:
    assert any("speech" in part.name for part in info("tiny/stage2_speech").parts)
