"""Strict recipes: an unknown key is an error with the nearest match, and overrides reach every leaf."""

from __future__ import annotations

from pathlib import Path

import pytest

from x2l.config import ModelConfig, digest, load_model_config, load_train_config, shipped


def test_overrides_reach_nested_keys_and_list_items() -> None:
    cfg = load_train_config(
        "tiny/stage2_image", ["schedule.warmup_steps=7", "data.0.path=mine-*.tar", "model.template.name=paper", "steps=1"]
    )
    assert (cfg.schedule.warmup_steps, cfg.data[0].path, cfg.model.template.name, cfg.steps) == (7, "mine-*.tar", "paper", 1)


def test_a_stage_builds_the_modalities_that_it_names_alone() -> None:
    assert list(load_train_config("tiny/stage2_image").model.modalities) == ["image"]
    assert list(load_train_config("tiny/stage2_image", ["only=[audio, image]"]).model.modalities) == ["audio", "image"]


def test_an_override_of_an_alias_leaves_the_other_as_it_is() -> None:
    cfg = load_model_config("tiny", ["modalities.video.interface.depth=1"])
    assert [cfg.modalities[name].interface["depth"] for name in ("image", "video")] == [4, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=4", "unknown key 'batchsize'; did you mean 'batch_size'"),
        ("schedule.warmup_step=1", "unknown key 'schedule.warmup_step'; did you mean 'warmup_steps'"),
        ("model.llm.dtype=float8", r"model.llm.dtype: .*'float8'"),
        ("steps=null", "exactly one of steps and epochs"),
        ("batch_size=many", "batch_size: .*'many'"),
        ("batch_size", "an override is key=value"),
        ("run.deeper=1", "'run' has no keys below it"),
        ("only=[imag]", "no modality 'imag'; did you mean 'image'.*it has image, video, speech, audio"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_train_config("tiny/stage2_image", [override])


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'tiny/stage2_imge'; did you mean 'tiny/stage2_image'\?; shipped: "):
        load_train_config("tiny/stage2_imge")


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="a recipe is a mapping, not list"):
        load_model_config(str(tmp_path / "r.yaml"))


def test_a_new_option_at_its_default_keeps_the_digest() -> None:
    class Later(ModelConfig):
        colour: str = "none"

    now = load_model_config("tiny")
    assert digest(Later(**now.model_dump())) == digest(now) != digest(Later(**now.model_dump(), colour="red"))


def test_the_digest_is_of_content() -> None:
    a, b = load_model_config("tiny"), load_model_config("tiny", ["template.system=Other."])
    assert digest(a) == digest(load_model_config("tiny")) != digest(b)


def test_every_shipped_recipe_opens_with_what_it_is_and_its_command() -> None:
    from x2l.config import RECIPES

    for name in shipped():
        first, second = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
        assert first.startswith("# ")
        assert second.startswith("#   x2l ")
