"""Recipes of data sets: strict YAML, as those of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from x2l.config import Strict

FOLDER = Path(__file__).parent


class SpokenSplit(Strict):
    path: str  # photos with captions or dialogues, relative to the data root
    questions: Literal["train", "test"]  # which side of the held-out questions
    voices: list[str]
    source: Literal["captions", "dialogues"] = "captions"
    licence: str = ""  # of rows that state none


class VSDialRecipe(Strict):
    kind: Literal["vsdial"]
    seed: int = 0
    pairs: int = 4
    takes: int = 2
    splits: dict[str, SpokenSplit]

    def only(self, names: Sequence[str]) -> VSDialRecipe:
        """The recipe with these splits alone.

        Raises:
            ValueError: there is no such split; the message names it.
        """
        for name in names:
            if name not in self.splits:
                raise ValueError(f"no split {name!r}: this recipe has {', '.join(self.splits)}")
        return self.model_copy(update={"splits": {name: self.splits[name] for name in names}})


class InstructPart(Strict):
    kind: str
    path: str  # relative to the data root; vsdial:<glob> lies in the folder of a VSDial set
    lang: Literal["en", "zh"]
    num: int | None = None
    licence: str = ""
    talking: bool = False


class InstructRecipe(Strict):
    kind: Literal["instruct"]
    seed: int = 0
    splits: dict[str, list[InstructPart]]


Recipe = VSDialRecipe | InstructRecipe
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="kind")])


def shipped() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """A recipe by shipped name or path.

    Raises:
        ValueError: there is none, or a key or value is wrong; the message says which.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no data recipe {name!r}; shipped: {', '.join(shipped())}")
    try:
        return _ADAPTER.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"data recipe {name}: {error}") from error
