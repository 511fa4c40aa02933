"""Spoken questions: the grammar, the held-out list, and their records."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from x2l.data import spoken
from x2l.data.media import decode_audio
from x2l.data.prompts import instructions
from x2l.data.tasks import TASKS
from x2l.types import Part, Sample
from x2l.vocabulary import spoken_form


def test_questions_differ_and_follow_from_the_seed() -> None:
    found = spoken.questions(300)
    assert len(set(found)) == 300
    assert spoken.questions(300) == found != spoken.questions(300, seed=1)
    assert not any(mark in text for text in found for mark in "{}=|")
    assert all(text[0].isupper() and text[-1] in ".?" for text in found)


def test_held_out_questions_are_at_least_50_and_not_of_the_grammar() -> None:
    held_out = instructions("questions_held_out", "en")
    assert len(set(held_out)) == len(held_out) >= 50
    assert set(held_out).isdisjoint(spoken.questions(3000))
    assert spoken.HELD_OUT_VOICE not in spoken.VOICES


def test_a_grammar_that_is_too_small_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "instructions", lambda task, lang: ("= x: a | b", "Is it {x}?", "Why?"))
    assert sorted(spoken.questions(3)) == ["Is it a?", "Is it b?", "Why?"]
    with pytest.raises(ValueError, match="the grammar gave 3 different questions, 4 were asked for"):
        spoken.questions(4)


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        ("Paris. It is old.", "Paris."),
        ("About 3.5 km! Yes", "About 3.5 km!"),
        ("One\nline. Two", "One\nline."),
        ("cut off in the mid", ""),
    ],
)
def test_first_sentence(answer: str, first: str) -> None:
    assert spoken.first_sentence(answer) == first


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_records_are_spoken_and_answered() -> None:
    import random

    first, last = spoken.spoken_questions(["Why?", "Who is it?", "Is it you?"], ("awb", "kal"), ["Because.", "", "Yes."])
    assert [first.fields["spk"], last.fields["spk"]] == ["awb", "awb"]
    assert 0.2 < len(decode_audio(first.media["flac"])) / 16_000 < 3
    (asked,) = TASKS["messages"](first, random.Random(0))
    assert asked.media[0].bytes == first.media["flac"]
    assert asked.messages[-1].text == "Because."
    (heard,) = TASKS["asr"](last, random.Random(0))
    assert heard.messages[-1].text == "Is it you?"
    (plain,) = spoken.spoken_questions(["Why?"], ("awb",))
    assert "messages" not in plain.fields


@pytest.mark.network
def test_the_default_model_hears_a_voice_that_it_was_not_trained_on(tmp_path: Path) -> None:
    """The demo's question, written down; of silence it says something else."""
    from x2l.assistant import Assistant
    from x2l.data.tasks import dictated
    from x2l.weights import resolve

    soundfile.write(tmp_path / "silence.wav", np.zeros(24_000), 16_000)
    asked = [
        Sample(str(path), (dictated(Part("speech", path=str(path)), "Repeat this sentence word for word."),))
        for path in (resolve("x2l:demo/question.flac"), tmp_path / "silence.wav")
    ]
    question, silence = Assistant.load("tiny").generate_text(asked, max_new_tokens=24)
    assert spoken_form(question) == "why is the sky blue"
    assert spoken_form(silence) != spoken_form(question)
