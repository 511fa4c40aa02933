"""Recordings of any kind through the whole model, on a tiny random LLM and Conformer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import yaml
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from x2l.assistant import Assistant
from x2l.build import build
from x2l.chat import Chat
from x2l.cli import app
from x2l.config import ModelConfig
from x2l.data.media import decode_audio
from x2l.recognizer import in_pieces
from x2l.types import Part, Sample, user

ENCODER = {"name": "conformer", "num_mels": 8, "channels": 2, "width": 16, "ffn_width": 16, "num_heads": 2, "kernel": 3,
           "num_blocks": 2, "pool_after": [1]}  # fmt: skip
LISTENER = {"width": 16, "num_heads": 2, "kernel": 3, "parts": 2, "rate": 0.3}


def recipe(llm_folder: Path) -> dict[str, Any]:
    interface = {"listener": LISTENER, "width": 16, "depth": 1, "heads": 2, "max_positions": 64}
    return {"llm": {"spec": str(llm_folder)}, "modalities": {"speech": {"encoder": ENCODER, "interface": interface}}}


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    return Assistant(build(ModelConfig.model_validate(recipe(llm_folder))))


def sound(seconds: float, seed: int = 0, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(int(rate * seconds)), rate, format="WAV")
    return buffer.getvalue()


def film(seconds: int) -> bytes:
    """Black pictures with a noisy sound track, as MP4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        pictures, track = container.add_stream("mpeg4", rate=5), container.add_stream("aac", rate=16_000)
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        for _ in range(5 * seconds):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(pictures.encode(frame))
        noise = (0.1 * np.random.default_rng(0).standard_normal((1, 16_000 * seconds))).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(track.encode(frame))
        for stream in (pictures, track):
            container.mux(stream.encode(None))
    return buffer.getvalue()


def test_mixed_lengths_give_the_same_text_alone_and_in_a_batch(model: Assistant) -> None:
    samples = [Sample(str(s), (user(Part("speech", bytes=sound(s, i)), "Go"),)) for i, s in enumerate((0.4, 2.0, 0.05, 1.1))]
    together = model.generate_text(samples, max_new_tokens=12)
    assert together == [model.generate_text([sample], max_new_tokens=12)[0] for sample in samples]


def test_a_twentieth_of_a_second_and_silence_are_answered(model: Assistant) -> None:
    quiet = io.BytesIO()
    soundfile.write(quiet, np.zeros(16_000), 16_000, format="WAV")
    for blob in (sound(0.05), quiet.getvalue()):
        assert list(model.stream([user(Part("speech", bytes=blob))], max_new_tokens=3))


@pytest.mark.slow
def test_ten_minutes_are_refused_with_the_remedy_where_the_cformer_ends(model: Assistant) -> None:
    with pytest.raises(ValueError, match=r"\d+ CIF embeddings, but this C-Former has 64 positions: cut the audio"):
        list(model.stream([user(Part("speech", bytes=sound(600.0)))]))
    with pytest.raises(ValueError, match="longer than 600 s"):
        list(model.stream([user(Part("speech", bytes=sound(601.0, rate=8_000)))]))


def test_the_sound_track_of_a_film_is_speech(model: Assistant) -> None:
    assert list(model.stream([user(Part("speech", bytes=film(2)))], max_new_tokens=3))


def test_a_spoken_question_needs_no_text(model: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, broken = tmp_path / "question.wav", tmp_path / "broken.wav"
    path.write_bytes(sound(1.0))
    broken.write_bytes(b"RIFF garbage")
    out = io.StringIO()
    console = Console(file=out, width=200)
    chat = Chat(model, {"max_new_tokens": 3}, console)
    lines = iter(["", f"/speech {broken}", f"/speech {path}", "", "", "And now?"])

    def read(*args: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    chat.loop()
    assert "error: not a readable sound" in out.getvalue()
    assert "press Enter" in out.getvalue()
    assert [[p.type for p in m.content] for m in chat.messages if m.role == "user"] == [["speech"], ["text"]]


def test_the_command_answers_a_recording(llm_folder: Path, tmp_path: Path, model: Assistant) -> None:
    trained = recipe(llm_folder)
    interface = model.model.modalities["speech"].get_submodule("interface").state_dict()
    save_file({name: value.contiguous() for name, value in interface.items()}, tmp_path / "speech.safetensors")
    trained["modalities"]["speech"]["weights"] = str(tmp_path / "speech.safetensors")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(trained))
    (tmp_path / "question.wav").write_bytes(sound(1.0))
    command = ["chat", "--model", str(tmp_path / "tiny.yaml"), "--max-new-tokens", "3", "--speech"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "question.wav")])
    assert result.exit_code == 0, result.output
    assert result.output.strip()
    assert "cannot read speech file" in str(CliRunner().invoke(app, [*command, "nowhere.wav"]).exception)


def test_an_untrained_interface_is_left_out_and_named(llm_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe(llm_folder)))
    assert Assistant.load(str(tmp_path / "tiny.yaml")).reads == []
    assert "reads no speech: no weights of a trained interface are given" in caplog.text


def test_what_is_written_down_is_no_longer_than_its_speech_allows(model: Assistant) -> None:
    """Each answer is the beginning of the free one, by the seconds of its own recording, whatever is in the batch."""
    samples = [Sample(str(s), (user("Go", Part("speech", bytes=sound(s, i))),)) for i, s in enumerate((0.1, 1.0, 2.0))]
    free = model.generate_text(samples, max_new_tokens=12)
    held = model.generate_text(samples, max_new_tokens=12, tokens_a_second=4.0)
    for sample, long, short, limit in zip(samples, free, held, (1, 4, 8), strict=True):
        assert long.startswith(short)
        assert short == model.generate_text([sample], max_new_tokens=limit)[0]
    assert len({len(text) for text in held}) > 1
    with pytest.raises(ValueError, match="one max_new_tokens for all rows"):
        model.generate_text(samples, num_beams=2, tokens_a_second=4.0)


def test_a_long_recording_is_written_down_in_pieces(model: Assistant) -> None:
    """Each piece is answered as if it were alone; what is short enough stays as it is, and a cut loses no sample."""
    long, short = sound(2.5, 1), sound(1.0, 2)
    samples = [Sample(str(i), (user("Go", Part("speech", bytes=blob)),)) for i, blob in enumerate((long, short))]
    wave = decode_audio(long)
    cut = [blob for blob, _ in in_pieces(wave, 1.0)]
    np.testing.assert_array_equal(np.concatenate([decode_audio(blob) for blob in cut]), wave)
    assert len(cut) >= 3
    assert all(len(decode_audio(blob)) <= 16_000 for blob in cut)
    alone = model.generate_text([Sample("", (user("Go", Part("speech", bytes=blob)),)) for blob in cut], max_new_tokens=5)
    together = model.generate_text(samples, max_new_tokens=5, piece_seconds=1.0)
    assert together == [" ".join(alone), *model.generate_text(samples[1:], max_new_tokens=5)]
    with pytest.raises(ValueError, match="none: 0 recordings, to be cut into pieces it takes one"):
        model.generate_text([Sample("none", (user("Go"),))], piece_seconds=1.0)
