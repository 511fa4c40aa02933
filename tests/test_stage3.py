"""Stage 3, and the chain of all stages, on tiny random models: only adapters change, caches change nothing, kills lose nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import picture, write_shard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from x2l import chain, train, words
from x2l.assistant import Assistant
from x2l.build import build
from x2l.checkpoint import sha256
from x2l.config import RECIPES, ModelConfig, SourceConfig, TrainConfig, load_chain_config, load_train_config
from x2l.data.collate import Collator
from x2l.stages import STAGES, Stage
from x2l.train import TrainError
from x2l.types import Part, Sample, user
from x2l.vocabulary import Vocabulary

WORDS = "A brown dog runs fast through deep white snow ."  # stage 1 wants eight words
CONFORMER = {"name": "conformer", "num_mels": 8, "channels": 2, "width": 16, "ffn_width": 16, "num_heads": 2, "kernel": 3,
             "num_blocks": 2, "pool_after": [1]}  # fmt: skip
PICTURE = {"encoder": {"name": "conftest:patches"}, "interface": {"width": 16, "depth": 1, "heads": 2, "num_queries": 4}}
DECODER = {"ffn_width": 16, "num_heads": 2, "num_blocks": 2}
LISTENER = {"width": 16, "num_heads": 2, "kernel": 3, "parts": 2}
SMALL: dict[str, dict[str, Any]] = {
    "image": PICTURE,
    "video": PICTURE | {"decode": {"num_frames": 2}},
    "audio": PICTURE,
    "speech": {"encoder": CONFORMER, "interface": {"listener": LISTENER, "reader": DECODER}},
}


def small(name: str, llm: Path) -> dict[str, Any]:
    """A modality of ``SMALL``; speech reads in a random table of the letters, for it has no Moonshine."""
    part = json.loads(json.dumps(SMALL[name]))
    if name == "speech":
        table = llm / "letters" / "decoder.safetensors"
        letters = Vocabulary.of(AutoTokenizer.from_pretrained(llm), "[ a-z']")
        if not table.exists():
            table.parent.mkdir()
            generator = torch.Generator().manual_seed(0)
            save_file({"embedding.weight": torch.randn(len(letters.texts) + 1, 16, generator=generator)}, table)
        part["interface"]["words"] = {"vocabulary": "[ a-z']", "table": str(table)}
    return part


def noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    samples = 0.1 * np.random.default_rng(seed).standard_normal(8_000 + 900 * seed)
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


def instruction(kind: str, *media: tuple[str, str]) -> bytes:
    content = [{"type": kind, "key": key} for kind, key in media] + [{"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is this."}]
    return json.dumps({"messages": turns, "lang": "en", "kind": kind}).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set that the tiny recipes name, of a few noises and one-coloured pictures."""
    root = tmp_path_factory.mktemp("data")
    photos = {
        f"p{i}": {
            "png": picture((40 * i, 9, 9)),
            "json": json.dumps({"en": [WORDS, f"A red dog {i} ."], "zh": ["一只狗。"] * 2}).encode(),
        }
        for i in range(4)
    }
    sounds = {f"s{i}": {"wav": noise(i), "json": json.dumps({"en": WORDS, "fold": 1}).encode()} for i in range(4)}
    said = {f"u{i}": {"wav": noise(i), "json": json.dumps({"text": "go on", "lang": "en", "spk": i}).encode()} for i in range(4)}
    lips = {f"v{i}": {"png": picture((9, 40 * i, 9)), "json": b'{"text": "bin red", "lang": "en"}'} for i in range(2)}
    answered = {
        f"a{i}": {
            "wav": noise(i),
            "json": json.dumps(json.loads(instruction("answered", ("speech", "wav"))) | {"text": "go on", "lang": "en"}).encode(),
        }
        for i in range(2)
    }
    mixed = {}
    for i in range(2):
        mixed[f"image-{i}"] = {"png": picture((9, 9, 40 * i)), "json": instruction("image-text", ("image", "png"))}
        mixed[f"video-{i}"] = {"png": picture((90, 9, 40 * i)), "json": instruction("video-text", ("video", "png"))}
        mixed[f"speech-{i}"] = {"wav": noise(i), "json": instruction("speech-text", ("speech", "wav"))}
        for kind in ("image-text-speech", "image-speech-text", "conversation"):
            both = instruction(kind, ("image", "png"), ("speech", "wav"))
            mixed[f"{kind}-{i}"] = {"png": picture((9, 90, 40 * i)), "wav": noise(i), "json": both}
    for name, rows in {
        "flickr8k/train-0000": photos, "flickr8k/val-0000": photos, "esc10/train-0000": sounds, "grid-s1/train-0000": lips,
        "speechocean762/train-0000": said, "spoken_questions/train-0000": said, "spoken_questions/answered-0000": answered,
        "xllm-instruct-mini/train-0000": mixed,
    }.items():  # fmt: skip
        write_shard(root / f"{name}.tar", rows)
    return root


def shrunk(name: str, llm: Path, root: Path, folder: Path, **changes: Any) -> Path:
    """A shipped tiny recipe on tiny random models, its runs below ``folder``."""
    raw: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    names = raw.get("only") or list(raw["model"]["modalities"])
    raw["model"] = {"llm": {"spec": str(llm)}, "modalities": {name: small(name, llm) for name in names}}
    raw["init"] = {part: source.replace("runs/tiny", str(folder)) for part, source in raw.get("init", {}).items()}
    if "vocabulary" in raw.get("stage_args", {}):
        raw["stage_args"]["vocabulary"] = "[ a-z']"
    if "decoder" in raw.get("stage_args", {}):
        raw["stage_args"] |= {"moonshine": False}
        raw["stage_args"]["decoder"] |= DECODER
    raw["trainable"] = {glob: rate for glob, rate in raw["trainable"].items() if not glob.startswith("encoder.")}
    for source in [*raw["data"], *raw.get("val", [])]:
        source["holdout"] = None
    raw |= {"data_root": str(root), "run": str(folder / name.split("/")[1]), "steps": 2, "epochs": None, "fresh": []}
    raw |= {"batch_size": 2, "accumulate": 1, "schedule": {"name": "cosine"}} | changes
    path = folder / f"{name.split('/')[1]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


LAST = {"image": "stage2_image_scored", "video": "stage2_video", "speech": "stage2_speech"}  # what stage 3 starts from


def untrained(llm: Path, folder: Path, *names: str) -> None:
    """Random interfaces, where stage 3 looks for those of the stages 2."""
    model = {"llm": {"spec": str(llm)}, "modalities": {name: small(name, llm) for name in names}}
    torch.manual_seed(0)
    built = build(ModelConfig.model_validate(model))
    for name in names:
        path = folder / LAST[name] / "final" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = built.model.modalities[name].get_submodule("interface").state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))


def test_stage_3_changes_adapters_alone(llm_folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and buffers of the LLM, of encoders, Q-Formers, C-Former and listener: all the same before and after."""
    untrained(llm_folder, tmp_path, "image", "video", "speech")
    cfg = load_train_config(str(shrunk("tiny/stage3", llm_folder, root, tmp_path, steps=4)))
    real, models = STAGES["self_critical"], []

    def watched(cfg: TrainConfig) -> Stage:
        stage = real(cfg)
        models.append((stage.model, {key: tensor.clone() for key, tensor in stage.model.state_dict().items()}))
        return stage

    monkeypatch.setitem(STAGES, "self_critical", watched)
    folder = train.train(cfg)
    ((model, before),) = models
    adapters = {"image": "1.linear", "video": "1.linear", "speech": "2.linear"}
    expected = {(name, f"{adapter}.{part}") for name, adapter in adapters.items() for part in ("weight", "bias")}
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {f"modalities.{name}.interface.{key}" for name, key in expected}
    for name in adapters:
        old = load_file(tmp_path / LAST[name] / "final" / f"{name}.safetensors")
        new = load_file(folder / f"{name}.safetensors")
        assert {(name, key) for key in old if not torch.equal(old[key].half(), new[key])} == {e for e in expected if e[0] == name}
    rows = [json.loads(line) for line in (tmp_path / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["bad_rows"] == 0


def test_no_loss_on_instructions(llm_folder: Path, root: Path, tmp_path: Path) -> None:
    untrained(llm_folder, tmp_path, "image", "video", "speech")
    cfg = load_train_config(str(shrunk("tiny/stage3", llm_folder, root, tmp_path, batch_size=12)))
    stage = STAGES["xllm"](cfg)
    instructions = [source for source in cfg.data if "messages" in source.tasks]
    assert len(instructions) == len(cfg.data) - 1  # the rest are captions, scored
    batch = stage.collate(train.open_feed(instructions, cfg.data_root, cfg.batch_size, cfg.seed).batch(0), 0)
    tokenizer = build(cfg.model).renderer.tokenizer
    supervised = "".join(tokenizer.decode([i for i in row.tolist() if i >= 0]) for row in batch.labels)
    assert supervised == "It is this.<|im_end|>" * 12
    assert sorted(batch.media) == ["image", "speech", "video"]


def test_one_language_of_a_bilingual_set(tmp_path: Path) -> None:
    rows = {f"r{i}": {"png": picture((i, 0, 0)), "json": json.dumps({"en": ["A dog ."], "lang": "en" if i % 3 else "zh"}).encode()}
            for i in range(9)}  # fmt: skip
    write_shard(tmp_path / "train.tar", rows | {"bad": {"png": b"", "json": b"{"}})
    source = SourceConfig(path="train.tar", tasks={"caption": {}}, licence="made by the test", where={"lang": "en"})
    feed = train.open_feed([source], str(tmp_path), 7, 0)
    assert len(feed.index) == 6 + 1  # the broken row is counted when its turn comes
    assert {family[0].id.split("/")[0] for family in feed.batch(0)} == {"r1", "r2", "r4", "r5", "r7", "r8"}
    assert len(feed.issues) == 1


def test_cached_formers_give_the_loss_of_live_ones(llm_folder: Path, root: Path, tmp_path: Path) -> None:
    """What stage 3 caches is the output of Q-Former and C-Former (in float16), and they run no more."""
    untrained(llm_folder, tmp_path, "image", "video", "speech")
    cfg = load_train_config(str(shrunk("tiny/stage3", llm_folder, root, tmp_path, batch_size=8)))
    stage = STAGES["xllm"](cfg)
    feed = train.open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed)
    families = feed.batch(0)
    cached = stage.collate(families, None)
    assert all(media.features is not None and media.features.x.shape[-1] == 16 for media in cached.media.values())
    built = build(cfg.model)
    live = Collator(built.renderer, built.processors, built.decoders, built.decode)
    samples = [sample for family in families for sample in family]
    stage.model.train()
    with torch.no_grad():
        loss, slow = stage.model(cached), stage.model(live.train(samples))
    torch.testing.assert_close(loss.loss_sum, slow.loss_sum, rtol=2e-3, atol=0)
    for modality in stage.model.modalities.values():
        modality.interface[0].forward = None  # a call would fail
    torch.testing.assert_close(stage.model(stage.collate(families, None)).loss_sum, loss.loss_sum)


def test_the_whole_chain_and_the_model_that_it_ends_in(
    llm_folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage of tiny/all in order, on tiny models; the result reads all four modalities; run again, nothing is trained."""
    monkeypatch.setattr(words.vocabulary, "__defaults__", (1,))
    listed = load_chain_config("tiny/all")
    assert listed is not None
    stages = [str(shrunk(name, llm_folder, root, tmp_path)) for name in listed.stages]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"stages": stages, "run": str(tmp_path / "all")}))
    recipe = chain.train_recipe(str(tmp_path / "all.yaml"))
    assert recipe == tmp_path / "all" / "model.yaml"
    trained = {name: part.weights for name, part in Assistant.load(str(recipe.parent)).config.modalities.items()}
    last = {"image": "stage3", "video": "stage3", "speech": "stage3", "audio": "stage2_audio"}
    assert trained == {name: str(tmp_path / run / "final" / f"{name}.safetensors") for name, run in last.items()}

    model = Assistant.load(str(recipe.parent))
    question = user(Part("image", bytes=picture((9, 9, 9))), Part("speech", bytes=noise(1)), Part("audio", bytes=noise(2)), "?")
    assert isinstance(model.generate_text([Sample("q", (question,))], max_new_tokens=3)[0], str)

    calls: list[Any] = []
    monkeypatch.setattr(chain, "train", calls.append)
    assert chain.train_recipe(str(tmp_path / "all.yaml")) == recipe
    assert calls == []

    first = tmp_path / "stage2_image" / "final" / "image.safetensors"
    state = load_file(first)
    save_file({name: tensor + 1 for name, tensor in state.items()}, first)
    with pytest.raises(TrainError, match="stage2_image_scored was begun with another starts_from"):
        chain.train_recipe(str(tmp_path / "all.yaml"))


def test_the_shipped_chain_starts_from_nothing_and_is_one_model() -> None:
    """What a stage of tiny/all starts from is exported by one before it; all share one LLM."""
    listed = load_chain_config("tiny/all")
    assert listed is not None
    done: set[str] = set()
    for name in listed.stages:
        cfg = load_train_config(name)
        assert {source.rpartition(":")[2].split("/final/")[0] for source in cfg.init.values()} <= done
        assert set(cfg.fresh) == {part for part, each in cfg.model.modalities.items() if each.weights}
        done.add(cfg.run)
    recipe = chain.merged([load_train_config(name) for name in listed.stages])
    assert sorted(recipe["modalities"]) == ["audio", "image", "speech", "video"]


@pytest.mark.parametrize("at", ["stage2_image_scored", "stage3"])
def test_a_chain_that_is_killed_goes_on(at: str, llm_folder: Path, root: Path, tmp_path: Path) -> None:
    """kill -9 in a stage, and the same command again: the weights are those of a chain that nobody killed."""
    untrained(llm_folder, tmp_path, "video", "speech")
    finished = {}
    for name in ("straight", "killed"):
        folder = tmp_path / name
        untrained(llm_folder, folder, "video", "speech")
        stages = [shrunk("tiny/stage2_image_scored", llm_folder, root, folder, init={}, save_every=2, val=[], steps=6),
                  shrunk("tiny/stage3", llm_folder, root, folder, save_every=2, steps=6)]  # fmt: skip
        (folder / "all.yaml").write_text(yaml.safe_dump({"stages": [str(path) for path in stages], "run": str(folder / "all")}))
        if name == "killed":
            slow_until_killed(folder / "all.yaml", folder / at)
        chain.train_recipe(str(folder / "all.yaml"))
        finished[name] = load_file(folder / "stage3" / "final" / "image.safetensors")
    assert all(torch.equal(tensor, finished["killed"][key]) for key, tensor in finished["straight"].items())


SLOW = """
import sys, time
from x2l import train
from x2l.cli import main
real = train.forward
def forward(*args):
    time.sleep(0.3)
    return real(*args)
train.forward = forward
main()
"""


def slow_until_killed(recipe: Path, run: Path) -> None:
    """Train in a process of its own, and kill it after the third step of the stage in ``run``."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", SLOW, "train", str(recipe)], env=env, stderr=subprocess.DEVNULL)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "final").exists()


def test_a_chain_needs_one_llm(llm_folder: Path, root: Path, tmp_path: Path) -> None:
    stages = [load_train_config(str(shrunk(name, llm_folder, root, tmp_path))) for name in ("tiny/stage2_image", "tiny/stage3")]
    other = stages[0].model_copy(update={"model": stages[0].model.model_copy(update={"llm": stages[0].model.llm.model_copy(
        update={"spec": "elsewhere"})})})  # fmt: skip
    with pytest.raises(ValueError, match=r"stage2_image: another LLM than in .*stage3"):
        chain.train_chain([other, stages[1]], tmp_path / "all")


def test_data_that_are_not_there_are_told_at_once(llm_folder: Path, root: Path, tmp_path: Path) -> None:
    stages = [load_train_config(str(shrunk(name, llm_folder, root, tmp_path))) for name in ("tiny/stage2_image", "tiny/stage3")]
    stages[1] = stages[1].model_copy(update={"data_root": str(tmp_path / "elsewhere")})
    with pytest.raises(ValueError, match=r"no data at .*elsewhere/xllm-instruct-mini/train-\*\.tar: make or link them"):
        chain.train_chain(stages, tmp_path / "all")
    assert not (tmp_path / "stage2_image").exists()


def test_the_export_tells_what_was_frozen(llm_folder: Path, root: Path, tmp_path: Path) -> None:
    untrained(llm_folder, tmp_path, "image", "video", "speech")
    folder = train.train(load_train_config(str(shrunk("tiny/stage3", llm_folder, root, tmp_path))))
    with safe_open(folder / "image.safetensors", "pt") as file:
        metadata = file.metadata()
    assert len(json.loads(metadata["frozen_sha256"])) == 64
    assert sha256(folder / "image.safetensors")
