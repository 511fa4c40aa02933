"""The assistant and the terminal conversation, on a tiny random model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import picture, tiny_model
from rich.console import Console
from typer.testing import CliRunner

from x2l.assistant import Assistant
from x2l.build import build
from x2l.chat import Chat
from x2l.cli import app
from x2l.config import ModelConfig
from x2l.types import Part, Sample, user


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture((200, 0, 0)))
    return path


def test_streamed_pieces_add_up_to_the_whole_answer(model: Assistant, photo: Path) -> None:
    question = user(Part("image", path=str(photo)), "What is it? 你看到什么？")
    pieces = list(model.stream([question], max_new_tokens=30))
    assert "".join(pieces).strip() == model.generate_text([Sample("s", (question,))], max_new_tokens=30)[0]


def test_render_shows_the_prompt_that_the_model_reads(model: Assistant, photo: Path) -> None:
    sample = Sample("s", (user(Part("image", path=str(photo)), "什么？"),))
    assert model.render(sample) == "<|im_start|>user\n<image>什么？<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_keeps_its_turns_and_media(model: Assistant, photo: Path) -> None:
    out = io.StringIO()
    chat = Chat(model, {"max_new_tokens": 5}, Console(file=out))
    chat.ask("Hello")
    chat.attach("image", photo)
    chat.ask("What is it?")
    assert [m.role for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert [p.type for p in chat.messages[2].content] == ["image", "text"]
    assert chat.waiting == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image nowhere.jpg", "cannot read image file 'nowhere.jpg'"),
        ("/video a.mp4", "unknown command '/video'"),
        ("/image {broken}", "error:"),
    ],
)
def test_bad_input_is_told_and_nothing_is_lost(
    model: Assistant, tmp_path: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff garbage")
    out = io.StringIO()
    console = Console(file=out, width=200)
    chat = Chat(model, {"max_new_tokens": 3}, console)
    lines = iter(["Hello", line.format(broken=broken), "And now?"])

    def read(*args: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    chat.loop()
    assert message in out.getvalue()
    assert len(chat.messages) == 4
    assert chat.waiting == []


def test_an_empty_answer_is_told(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    chat = Chat(model, {}, Console(file=out, width=200))
    monkeypatch.setattr(model, "stream", lambda *args, **options: iter(["", " "]))
    chat.ask("Well?")
    assert "the model has no answer" in out.getvalue()
    monkeypatch.setattr(model, "stream", lambda *args, **options: iter(["Yes."]))
    chat.ask("Well?")
    assert out.getvalue().count("no answer") == 1


def test_a_question_over_the_context_leaves_no_trace(model: Assistant) -> None:
    chat = Chat(model, {"max_new_tokens": 5}, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="exceed the LLM's context of 1024"):
        chat.ask("x" * 2000)
    assert chat.messages == []


@pytest.mark.parametrize("command", [[], ["chat"], ["train"], ["eval"], ["eval", "caption"], ["recipes"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_a_missing_file_is_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"cannot read video file '.*none.mp4': No such file"):
        CliRunner().invoke(app, ["chat", "--video", str(tmp_path / "none.mp4"), "What?"], catch_exceptions=False)
