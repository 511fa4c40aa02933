"""Caption scores against the toolkit's own, predict -> score -> report without a real model."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from x2l.data.collate import raw
from x2l.eval import bootstrap, controls, metrics, records, tasks
from x2l.eval.predict import predict
from x2l.eval.report import report, scoreboard
from x2l.types import Part, Sample, user

FLICKR8K = Path(__file__).parents[2] / "shared/data/flickr8k"
INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def photo_samples(num: int = 6) -> list[Sample]:
    return [
        Sample(
            f"s{i}",
            (user(Part("image", bytes=png(20 * i)), "Describe <b>the</b> photo."),),
            {"references": [f"a dog number {i} runs on grass", f"the dog {i} is running"]},
        )
        for i in range(num)
    ]


class Looker:
    """A stub that truly looks: it reads the red value of the image, and counts its calls."""

    def __init__(self, fail_after: int | None = None):
        self.asked: list[str] = []
        self.fail_after = fail_after

    def generate_text(self, samples: list[Sample], **decode) -> list[str]:
        answers = []
        for sample in samples:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(sample.id)
            red = Image.open(io.BytesIO(sample.media[0].bytes)).getpixel((0, 0))[0] if sample.media else 255
            answers.append(f"A dog number {red // 20} runs on grass.")
        return answers


def scores_of(hyps, refs):
    return {name: bootstrap.score(stat) for name, stat in metrics.caption_stats(hyps, refs).items()}


def test_scores_equal_the_toolkit():
    hyps = ["A dog runs on the grass .", "two men", "", "A child's red t-shirt!"]
    refs = [
        ["a dog is running on grass", "the dog runs"],
        ["two men sit on a bench", "men sitting"],
        ["a cat"],
        ["a child 's red t-shirt", "kid"],
    ]
    gts = {i: [" ".join(metrics.caption_tokens(r)) for r in texts] for i, texts in enumerate(refs)}
    res = {i: [" ".join(metrics.caption_tokens(h))] for i, h in enumerate(hyps)}
    ours = scores_of(hyps, refs)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    np.testing.assert_allclose([ours[f"BLEU-{n}"].value for n in (1, 2, 3, 4)], 100 * np.array(bleu), rtol=1e-12)
    assert ours["CIDEr"].value == pytest.approx(Cider().compute_score(gts, res)[0], rel=1e-12)
    assert all(s.low <= s.value <= s.high for s in ours.values())
    assert scores_of([None, *hyps[1:]], refs) == scores_of(["", *hyps[1:]], refs)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Two dogs -- one's black , one isn't !", "two dogs one s black one isn t"),
        ("A T-shirt (red) & 3 cats.", "a t-shirt red 3 cats"),
        ("两个人坐在长椅上。", "两 个 人 坐 在 长 椅 上"),
        ("", ""),
    ],
)
def test_caption_tokens(text, tokens):
    assert " ".join(metrics.caption_tokens(text)) == tokens


@pytest.mark.skipif(shutil.which("java") is None or not FLICKR8K.exists(), reason="needs Java and Flickr8k")
def test_our_tokens_score_like_the_ptb_tokeniser():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with tarfile.open(FLICKR8K / "val-0000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".json")][:200]
        captions = [json.load(tar.extractfile(name))["en"] for name in names]
    hyps, refs = [texts[0] for texts in captions], [texts[1:] for texts in captions]
    ours = scores_of(hyps, refs)["BLEU-4"].value
    tokenise = PTBTokenizer().tokenize
    gts = tokenise({i: [{"caption": text} for text in texts] for i, texts in enumerate(refs)})
    res = tokenise({i: [{"caption": text}] for i, text in enumerate(hyps)})
    assert ours == pytest.approx(100 * Bleu(4).compute_score(gts, res, verbose=0)[0][3], abs=0.2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor():
    hyps = ["a dog runs on grass", "a man"]
    assert 90 < metrics.meteor(hyps, [["a dog runs on grass"], ["a man"]]) <= 100
    assert metrics.meteor(hyps, [["two red cars"], ["some birds"]]) < 10


def test_bad_captions_are_refused():
    with pytest.raises(ValueError, match="no reference"):
        metrics.caption_stats(["a"], [["..."]])
    with pytest.raises(ValueError, match="got 1 and 2"):
        metrics.caption_stats(["a"], [["a"], ["b"]])


def test_bootstrap_seed_and_clusters():
    """E9: the same seed gives the same interval; clusters widen it where samples of one image agree."""
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(30), 3)
    values = rng.normal(size=30)[images] + 0.1 * rng.normal(size=90)
    stats = bootstrap.mean_of(values)
    naive = bootstrap.score(stats, seed=3)
    clustered = bootstrap.score(stats, clusters=images.tolist(), seed=3)
    assert clustered == bootstrap.score(stats, clusters=images.tolist(), seed=3)
    assert clustered != bootstrap.score(stats, clusters=images.tolist(), seed=4)
    assert clustered.high - clustered.low > 1.4 * (naive.high - naive.low)
    analytic = 2 * 1.96 * values.std() / np.sqrt(90)  # the central limit theorem as the oracle
    assert naive.high - naive.low == pytest.approx(analytic, rel=0.1)


def test_paired_difference():
    rng = np.random.default_rng(2)
    values = rng.normal(size=200)
    a, b = bootstrap.mean_of(values), bootstrap.mean_of(values - 0.1)
    difference, p = bootstrap.paired_difference(a, b)
    assert difference.value == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1)
    assert p < 0.01
    assert bootstrap.paired_difference(a, a)[1] == 1.0


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=30), st.integers(0, 5))
def test_derangement(groups, seed):
    if 2 * max(groups.count(g) for g in groups) > len(groups):
        with pytest.raises(ValueError, match="are alike in what is to be exchanged"):
            controls.derangement(groups, seed)
        return
    source = controls.derangement(groups, seed)
    assert sorted(source) == list(range(len(groups)))
    assert all(groups[i] != groups[j] for i, j in enumerate(source))
    assert source == controls.derangement(groups, seed)


def test_the_seed_draws_the_derangement():
    one, other = (controls.derangement([f"{i:03}" for i in range(200)], seed) for seed in (0, 1))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_predict_score_and_controls(tmp_path):
    samples = photo_samples()
    run = predict(Looker(), samples, tmp_path / "run", task="caption", model_info=INFO, decode={"max_new_tokens": 9})
    wrong = predict(Looker(), samples, tmp_path / "wrong", task="caption", model_info=INFO, control="wrong-image")
    blank = predict(Looker(), samples, tmp_path / "blank", task="caption", model_info=INFO, control="blank")
    plain = tasks.score(run)
    assert plain["scores"]["BLEU-4"]["value"] == pytest.approx(100, abs=1e-3)
    assert plain["coverage"] == 1
    assert tasks.score(wrong)["scores"]["BLEU-4"]["value"] < 70
    assert tasks.score(blank)["scores"]["BLEU-4"]["value"] < 70
    row = records.read(run / "records.jsonl")[2]
    assert row["output"] == "a dog number 2 runs on grass"
    assert row["media"] == [{"type": "image", "sha256": records.sha256(png(40))}]
    manifest = records.read_json(run / "run.json")
    assert {"task_sha256", "packages", "git_commit", "batch_size", "model", "decode", "seed"} <= manifest.keys()


def test_resume_by_id_asks_only_what_is_missing(tmp_path):
    """A killed run, a torn last line, samples in another order: nothing is asked twice, nothing is lost."""
    samples = photo_samples()
    keep = {"task": "caption", "model_info": INFO, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        predict(Looker(fail_after=3), samples, tmp_path, **keep)
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"id": "s3", "raw": "torn')
    second = Looker()
    predict(second, samples[::-1], tmp_path, **keep)
    assert second.asked == ["s5", "s4", "s3"]
    assert tasks.score(tmp_path)["coverage"] == 1
    assert len(records.read(tmp_path / "records.jsonl")) == 6


def test_one_character_of_the_prompt_is_another_request(tmp_path):
    """E19."""
    samples = photo_samples(2)
    predict(Looker(), samples, tmp_path, task="caption", model_info=INFO)
    image, text = samples[0].messages[0].content
    changed = replace(samples[0], messages=(user(image, text.text + "!"),))
    second = Looker()
    predict(second, [changed, samples[1]], tmp_path, task="caption", model_info=INFO)
    assert second.asked == ["s0"]
    assert len({row["prompt_sha256"] for row in records.read(tmp_path / "records.jsonl")}) == 2
    assert tasks.score(tmp_path)["num_samples"] == 2


def test_a_lossy_rendering_does_not_hide_a_change(tmp_path):
    for text in ("一", "二"):
        model = Looker()
        sample = Sample("s", (user(Part("image", bytes=png(0)), text),), {"references": ["a"]})
        predict(model, [sample], tmp_path, task="caption", model_info=INFO, render=lambda sample: "\ufffd")
        assert model.asked == ["s"]


def test_score_again_without_a_model(tmp_path):
    """E18."""
    predict(Looker(), photo_samples(), tmp_path, task="caption", model_info=INFO)
    first = tasks.score(tmp_path)
    assert tasks.score(tmp_path) == first == records.read_json(tmp_path / "scores.json")


def test_missing_answers_cost(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict(Looker(fail_after=4), photo_samples(), tmp_path, task="caption", model_info=INFO, batch_size=2)
    result = tasks.score(tmp_path)
    assert result["coverage"] == pytest.approx(4 / 6)
    assert result["scores"]["BLEU-4"]["value"] < 80


def test_bad_runs_are_refused(tmp_path):
    samples = photo_samples(2)
    predict(Looker(), samples, tmp_path, task="caption", model_info=INFO)
    with pytest.raises(ValueError, match="holds another run"):
        predict(Looker(), samples, tmp_path, task="caption", model_info={**INFO, "checkpoint": "1" * 64})
    with pytest.raises(ValueError, match="more than once"):
        predict(Looker(), [samples[0], samples[0]], tmp_path / "a", task="caption", model_info=INFO)
    with pytest.raises(ValueError, match="unknown control 'wrong'"):
        predict(Looker(), samples, tmp_path / "b", task="caption", model_info=INFO, control="wrong")
    with pytest.raises(ValueError, match="has no reference"):
        predict(Looker(), [Sample("x", (user("hi"),))], tmp_path / "c", task="caption", model_info=INFO)
    with pytest.raises(ValueError, match="needs bytes or a path"):
        raw(Part("image", key="1.jpg"))


def test_report_is_one_offline_page(tmp_path):
    samples = photo_samples()
    runs = [
        predict(Looker(), samples, tmp_path / str(control), task="caption", model_info=INFO, control=control)
        for control in (None, "wrong-image")
    ]
    page = report(runs, tmp_path / "report.html", num_cards=4).read_text()
    assert page.count("class=card>") == 4 + 1  # drawn, and the worst
    assert page.count("data:image/jpeg;base64,") == 5
    assert page.count("data:image/png;base64,") == 1
    assert "Describe &lt;b&gt;the&lt;/b&gt; photo." in page
    assert "control: wrong-image" in page
    assert "Google NIC" in page
    assert "http" not in page
    with pytest.raises(ValueError, match="only control runs"):
        report(runs[1:], tmp_path / "report.html")


class Blind:
    """A stub that never looks."""

    def generate_text(self, samples: list[Sample], **decode) -> list[str]:
        return ["a dog number 3 runs on grass"] * len(samples)


def test_a_task_solved_blind_is_found_out(tmp_path):
    """A swapped image must change the scores of a model that looks, and cannot change those of one that does not."""
    samples = photo_samples(20)
    looks, blind = [
        [
            predict(stub, samples, tmp_path / f"{i}{control}", task="caption", model_info=INFO, control=control)
            for control in (None, "wrong-image")
        ]
        for i, stub in enumerate((Looker(), Blind()))
    ]
    assert not tasks.solved_blind(*map(tasks.score, looks))
    assert "BLEU-4" in tasks.solved_blind(*map(tasks.score, blind))
    assert "Not earned by looking" in report(blind, tmp_path / "page.html").read_text()
    difference = tasks.compare(*looks)["BLEU-4"]
    assert difference["low"] > 0
    assert difference["p"] < 0.01
    assert tasks.compare(*blind)["BLEU-4"]["p"] == 1
    other = predict(Blind(), samples[:3], tmp_path / "few", task="caption", model_info=INFO)
    with pytest.raises(ValueError, match="compare like with like"):
        tasks.compare(looks[0], other)


def test_the_name_of_a_published_set_is_refused_for_a_part(tmp_path):
    run = predict(Blind(), photo_samples(3), tmp_path, task="caption", model_info=INFO, dataset="Flickr8k test")
    with pytest.raises(ValueError, match="means 1000 samples"):
        tasks.score(run)


def test_scoreboard(tmp_path):
    run = predict(Looker(), photo_samples(3), tmp_path, task="caption", model_info=INFO, dataset="three photos")
    lines = scoreboard([run]).splitlines()
    assert lines[0].startswith("| caption three photos | n | coverage | BLEU-1 |")
    assert lines[2].startswith("| this model | 3 | 1.000 | 100.0 [100.0, 100.0] |")
