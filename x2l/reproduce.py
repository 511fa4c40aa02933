"""The paper's findings at the scale of one machine: each trains and asks what it compares, and says whether it holds.

A finding is a function of a `Lab`, which trains and asks for one seed and leaves out what is done already. It holds when, in
every seed, the whole 95 % interval of the paired difference lies on the side that the paper claims.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import HoldoutConfig, ModelConfig, TrainConfig, load_train_config
from x2l.data.sources import Record, read_source
from x2l.eval import questions, records, tasks
from x2l.eval.predict import predict
from x2l.eval.report import format_score
from x2l.train import train
from x2l.types import RunError, Sample


class Scale(NamedTuple):
    """How much a run of the findings costs."""

    words: int  # steps of stage 1
    steps: int  # of stage 2
    instruct: int  # of stage 3
    batch: int  # photos a step of stages 2 and 3
    photos: int  # percent of the training photos
    few: int  # percent of them that "less data" is
    items: int  # test questions


SCALES = {
    "smoke": Scale(2, 2, 2, 2, 100, 80, 4),
    "small": Scale(50, 24, 20, 6, 8, 1, 40),
    "medium": Scale(300, 200, 100, 12, 50, 5, 200),
    "full": Scale(550, 600, 400, 20, 100, 10, 500),
}
WORDS_BATCH = 4  # photos a step of stage 1 for each of stage 2


class Missing(RunError):
    """What a finding needs and this machine lacks; the message says how to make it."""


class Comparison(NamedTuple):
    """One claim about two runs on the same questions."""

    claim: str
    score: str
    better: Path
    worse: Path


@dataclass
class Lab:
    """Trains and asks for one seed, below ``out/<arm>/seed<n>``; what is complete is not done again.

    Args:
        recipes: recipe name -> path of another recipe in its place (tests train tiny random models).
    """

    out: Path
    data_root: Path
    scale: Scale
    seed: int
    recipes: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, name: str) -> TrainConfig:
        """A shipped recipe on this lab's data, without validation."""
        cfg = load_train_config(self.recipes.get(name, name), [f"data_root={self.data_root}"])
        return cfg.model_copy(update={"val": [], "epochs": None})

    def train(self, arm: str, cfg: TrainConfig, steps: int, batch: int, **changes: Any) -> Path:
        """The folder of exported weights of ``cfg`` after ``steps``, trained now unless it was before."""
        run = self.out / arm / f"seed{self.seed}"
        plan = cfg.schedule.model_copy(update={"warmup_steps": min(cfg.schedule.warmup_steps, steps // 10)})
        sizes = {"run": str(run), "seed": self.seed, "steps": steps, "batch_size": batch, "schedule": plan, "save_every": 50}
        cfg = cfg.model_copy(update=sizes | changes)
        told, final = run / "config.json", run / "final"
        same = told.is_file() and told.read_text() == cfg.model_dump_json(indent=1)
        return final if same and any(final.glob("*.safetensors")) else train(cfg)

    def ask(self, arm: str, model: ModelConfig, task: str, asked: Sequence[Sample], control: str | None = None) -> Path:
        """The scored run of a model on questions, under a control or none."""
        run = self.out / arm / f"seed{self.seed}" / "-".join(["answers", task, *([control] if control else [])])
        if (run / "scores.json").is_file() and records.read_json(run / "scores.json")["coverage"] == 1:
            return run
        assistant = Assistant(build(model))
        predict(
            assistant, asked, run, task=task, model_info=assistant.info(), control=control, seed=self.seed,
            decode={"max_new_tokens": 32}, render=assistant.render,
        )  # fmt: skip
        tasks.score(run)
        return run

    def test(self, pattern: str) -> list[Record]:
        """Test records below the data root.

        Raises:
            Missing: there are none.
        """
        path = self.data_root / pattern
        if not list(path.parent.glob(path.name)):
            raise Missing(f"no {path}: make it with x2l data make {path.parent.name} (docs/transforms.md)")
        return list(read_source(str(path)))


# ---------------------------------------------------------------- (a), (b), (c): the image interface


def image_arm(
    lab: Lab, arm: str, start: Mapping[str, str], lang: str = "en", few: bool = False, model: ModelConfig | None = None
) -> Path:
    """Stage 2 of the image interface on captions: from the weights of ``start`` (``init`` of a recipe), on all photos or few."""
    cfg = lab.recipe("tiny/stage2_image")
    data = [source.model_copy(update={"tasks": {"caption": {"lang": lang, "num": 2}}}) for source in cfg.data]
    changes = {"init": dict(start), "data": thinned(lab, data, few), "model": model or cfg.model, "fresh": ["image"]}
    return lab.train(arm, cfg, lab.scale.steps, lab.scale.batch, **changes)


def words_arm(lab: Lab, arm: str, few: bool = False) -> dict[str, str]:
    """Stage 1 of the image interface, as a start of stage 2."""
    cfg = lab.recipe("tiny/stage1_image")
    final = lab.train(arm, cfg, lab.scale.words, WORDS_BATCH * lab.scale.batch, data=thinned(lab, cfg.data, few))
    return {"modalities.image.interface": str(final / "image.safetensors")}


def thinned(lab: Lab, sources: Sequence[Any], few: bool) -> list[Any]:
    """The scale's share of each source's photos, drawn by a hash of their captions."""
    percent = lab.scale.few if few else lab.scale.photos
    if percent == 100:
        return list(sources)
    part = HoldoutConfig(field="en", percent=percent, part="held_out")
    return [source.model_copy(update={"holdout": part}) for source in sources]


def captions(lab: Lab, arm: str, weights: Path, lang: str = "en", model: ModelConfig | None = None) -> Path:
    """What a trained image interface writes about test photos."""
    asked = questions.caption(lab.test("flickr8k/test-*.tar"), lang)
    model = with_weights(model or lab.recipe("tiny/stage2_image").model, {"image": str(weights / "image.safetensors")})
    return lab.ask(arm, model, "caption", questions.draw(asked, lab.scale.items, lab.seed))


def initialised(lab: Lab) -> list[Comparison]:
    """(a) A Q-Former that has learned to read pictures before beats one from nothing."""
    start = image_arm(lab, "init", words_arm(lab, "words"))
    better, worse = captions(lab, "init", start), captions(lab, "no-init", image_arm(lab, "no-init", {}))
    return [Comparison("stage 1 before stage 2 > stage 2 from nothing", "CIDEr", better, worse)]


def more_data(lab: Lab) -> list[Comparison]:
    """(b) More image-text pairs make a better interface, at an equal number of steps."""
    few = image_arm(lab, "few", words_arm(lab, "words-few", few=True), few=True)
    better = captions(lab, "init", image_arm(lab, "init", words_arm(lab, "words")))
    return [Comparison(f"{lab.scale.photos} % of the photos > {lab.scale.few} %", "CIDEr", better, captions(lab, "few", few))]


def transferred(lab: Lab) -> list[Comparison]:
    """(c) A Q-Former that learned from English captions, before another LLM, is a good start for Chinese ones."""
    cfg = lab.recipe("bilingual/stage2_image")
    model = cfg.model.model_copy(update={"modalities": {"image": cfg.model.modalities["image"]}})
    runs = []
    for arm, start in (("zh-transfer", cfg.init), ("zh-scratch", {})):
        weights = image_arm(lab, arm, start, "zh", model=model)
        runs.append(captions(lab, arm, weights, "zh", model))
    return [Comparison("Chinese after English > Chinese from nothing", "CIDEr", *runs)]


# ---------------------------------------------------------------- (d), (e): stage 3


def around_stage3(lab: Lab) -> dict[str, ModelConfig]:
    """The joined model before stage 3 and after it.

    Raises:
        Missing: an interface that stage 3 starts from.
    """
    cfg = lab.recipe("tiny/stage3")
    start = {name.split(".")[1]: source for name, source in cfg.init.items()}
    lacking = [source for source in start.values() if not Path(source).is_file()]
    if lacking:
        raise Missing(f"no {', '.join(lacking)}: train the stages before (x2l train tiny/all)")
    final = lab.train("stage3", cfg, lab.scale.instruct, lab.scale.batch)
    after = {path.stem: str(path) for path in final.glob("*.safetensors")}
    return {"stage2": with_weights(cfg.model, start), "stage3": with_weights(cfg.model, after)}


def recognised(lab: Lab) -> list[Comparison]:
    """(d) A photo helps to write down what is said about it; the instruction is the same with it and without."""
    asked = questions.draw(questions.masr(lab.test("vsdial-mini/test-*.tar")), lab.scale.items, lab.seed)
    found = []
    for stage, model in around_stage3(lab).items():
        photo = lab.ask(f"{stage}-masr", model, "asr", asked)
        for control in ("no-image", "wrong-image", "blank"):
            other = lab.ask(f"{stage}-masr", model, "asr", asked, control)
            found.append(Comparison(f"after {stage}: speech + photo < speech + {control}", "WER", photo, other))
    return found


def composed(lab: Lab) -> list[Comparison]:
    """(e) Interfaces trained apart answer a spoken question about a photo, and better after stage 3."""
    asked = questions.draw(questions.spoken_vqa(lab.test("vsdial-mini/test-*.tar")), lab.scale.items, lab.seed)
    runs, found = dict[str, Path](), list[Comparison]()
    for stage, model in around_stage3(lab).items():
        runs[stage] = lab.ask(f"{stage}-spoken", model, "qa", asked)
        for control in ("wrong-image", "blank"):
            other = lab.ask(f"{stage}-spoken", model, "qa", asked, control)
            found.append(Comparison(f"after {stage}: the photo > {control}", "contains", runs[stage], other))
        written = lab.ask(f"{stage}-spoken", model, "qa", asked, "typed")
        found.append(Comparison(f"after {stage}: the typed question > the spoken one", "contains", written, runs[stage]))
    return [Comparison("spoken: after stage3 > after stage2", "contains", runs["stage3"], runs["stage2"]), *found]


def with_weights(model: ModelConfig, files: Mapping[str, str]) -> ModelConfig:
    """A model whose interfaces are loaded from ``files``, by modality."""
    parts = {name: part.model_copy(update={"weights": files.get(name, part.weights)}) for name, part in model.modalities.items()}
    return model.model_copy(update={"modalities": parts})


FINDINGS: dict[str, Callable[[Lab], list[Comparison]]] = {
    "a": initialised,
    "b": more_data,
    "c": transferred,
    "d": recognised,
    "e": composed,
}


# ---------------------------------------------------------------- what it says


def verdict(differences: Sequence[Mapping[str, float]], lower_is_better: bool) -> str:
    """``holds``, ``reversed`` or ``open``: where the intervals of all seeds lie. ``differences`` are better - worse."""
    sign = -1 if lower_is_better else 1
    ends = [sorted((sign * each["low"], sign * each["high"])) for each in differences]
    if all(low > 0 for low, _ in ends):
        return "holds"
    return "reversed" if all(high < 0 for _, high in ends) else "open"


def table(found: Sequence[Sequence[Comparison]], seeds: Sequence[int]) -> tuple[str, list[str]]:
    """Both scores and their paired difference for each claim and seed, as Markdown; and the verdicts.

    Args:
        found: for each seed, the same comparisons.
    """
    lines, verdicts = [["claim", "score", "seed", "better", "worse", "difference", "p", "verdict"], ["---"] * 8], []
    for claims in zip(*found, strict=True):
        first = claims[0]
        compared = [tasks.compare(each.better, each.worse, seed)[first.score] for each, seed in zip(claims, seeds, strict=True)]
        said = verdict(compared, first.score in tasks.LOWER_IS_BETTER)
        verdicts.append(f"{first.claim}: {said}")
        for each, seed, difference in zip(claims, seeds, compared, strict=True):
            pair = [format_score(tasks.stored_score(run)["scores"][first.score]) for run in (each.better, each.worse)]
            lines.append([each.claim, first.score, str(seed), *pair, format_score(difference), f"{difference['p']:.3f}", said])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), verdicts


def reproduce(
    names: Sequence[str], out: Path, data_root: Path, scale: str = "small", seeds: Sequence[int] = (0, 1),
    recipes: Mapping[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """Run findings and write ``out/<scale>/<name>.md`` for each; returns a line for each claim, and for what is left out.

    Raises:
        ValueError: an unknown finding or scale, or no seed.
    """
    unknown = [name for name in names if name not in FINDINGS]
    if unknown or scale not in SCALES or not seeds:
        raise ValueError(
            f"findings are {', '.join(FINDINGS)}, scales {', '.join(SCALES)}, seeds at least one; got {[*names]}, {scale}"
        )
    folder, lines = out / scale, []
    folder.mkdir(parents=True, exist_ok=True)
    labs = [Lab(folder, data_root, SCALES[scale], seed, recipes or {}) for seed in seeds]
    for name in names:
        finding = FINDINGS[name]
        try:
            text, verdicts = table([finding(lab) for lab in labs], seeds)
        except Missing as error:
            lines.append(f"({name}) left out: {error}")
            continue
        about = json.dumps(SCALES[scale]._asdict())
        (folder / f"{name}.md").write_text(f"{finding.__doc__}\n\n{text}\n\nScale {scale}: `{about}`\n", encoding="utf-8")
        lines += [f"({name}) {line}" for line in verdicts]
    return lines
