"""The engine against the assistant: whatever is batched, cached or cut in chunks, answers are those of one request alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import is_idle

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.devices import bf16_in_hardware
from x2l.serve import lanes
from x2l.serve.answer import Answer, Busy, Decode, EngineError, RequestError, Timeout
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.store import EmbeddingStore, Prefix, PrefixStore, common
from x2l.serve.text import TextStream
from x2l.types import Message, Part, assistant, user

RED, BLUE = picture((250, 0, 0)), picture((0, 0, 250))


def image(blob: bytes) -> Part:
    return Part("image", bytes=blob)


MIXED: list[list[Message]] = [
    [user(image(RED), "What?")],
    [user("Hello, how are you today?")],
    [user("One ", image(BLUE), " and two ", image(RED), "?")],
    [user("Hi"), assistant("Hello."), user(image(BLUE), "And this?")],
    [user(image(RED), "What? And why?")],
    [user("x" * 200)],
    [user("你好")],
    [user(image(BLUE))],
]


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))


@pytest.fixture
def engine(model: Assistant) -> Iterator[Engine]:
    engine = Engine(model, EngineConfig(prefill_chunk=64))
    yield engine
    engine.close()


def alone(model: Assistant, messages: list[Message], max_new_tokens: int = 20) -> str:
    return "".join(model.stream(messages, max_new_tokens))


def test_concurrent_mixed_answers_equal_single_ones(model: Assistant, engine: Engine) -> None:
    lengths = [20, 7, 20, 1, 13, 20, 3, 20]  # rows leave at different times
    answers = [engine.submit(m, Decode(n)) for m, n in zip(MIXED, lengths, strict=True)]
    assert ["".join(answer) for answer in answers] == [alone(model, m, n) for m, n in zip(MIXED, lengths, strict=True)]
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert engine.stats.steps < sum(lengths)  # they were decoded together
    assert is_idle(engine)


def test_turns_reuse_states_and_change_nothing(model: Assistant, engine: Engine) -> None:
    talk = [user(image(RED), "What is it?")]
    for question in ("And now?", "Why?"):
        answer = engine.submit(talk, Decode(12))
        text = "".join(answer)
        assert text == alone(model, talk, 12)
        talk = [*talk, assistant(text), user(question)]
    again = engine.submit(talk, Decode(5))
    assert "".join(again) == alone(model, talk, 5)
    assert again.usage.cached > 40
    assert again.usage.media == {"image": 4}
    assert engine.stats.embedding_misses == 1
    other = engine.submit(talk, Decode(5), owner="somebody else")
    assert "".join(other) == "".join(engine.submit(talk, Decode(5)))
    assert other.usage.cached == 0


def test_requests_of_the_same_moment_share_what_they_begin_with(model: Assistant, engine: Engine) -> None:
    talks = [[user("One long beginning " * 8, image(RED), question)] for question in ("What?", "Who?", "Where?")]
    answers = [engine.submit(talk, Decode(30)) for talk in talks]
    assert ["".join(answer) for answer in answers] == [alone(model, talk, 30) for talk in talks]
    assert [answer.usage.cached > 150 for answer in answers] == [False, True, True]


def test_long_answers_outgrow_their_room(model: Assistant, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ROOM", 3)
    monkeypatch.setattr(engine, "stops", set())
    counts = [40, 11, 25]
    answers = [engine.submit(talk, Decode(n)) for talk, n in zip(MIXED, counts, strict=False)]
    texts = ["".join(answer) for answer in answers]
    assert [answer.usage.completion for answer in answers] == counts
    monkeypatch.setattr(lanes, "ROOM", 1000)
    assert texts == ["".join(engine.submit(talk, Decode(n))) for talk, n in zip(MIXED, counts, strict=False)]


def test_a_changed_picture_shares_nothing_behind_it(model: Assistant, engine: Engine) -> None:
    first = engine.submit([user("Look: ", image(RED), " what?")], Decode(5))
    list(first)
    second = engine.submit([user("Look: ", image(BLUE), " what?")], Decode(5))
    assert "".join(second) == alone(model, [user("Look: ", image(BLUE), " what?")], 5)
    assert second.usage.cached == len("<|im_start|>user\nLook: ") - len("<|im_start|>") + 1


def test_sampling_depends_on_the_seed_alone(engine: Engine) -> None:
    decode = Decode(15, temperature=1.0, top_p=0.9, seed=3)
    quiet = "".join(engine.submit(MIXED[0], decode))
    crowd = [engine.submit(m, Decode(15, temperature=1.0, seed=i)) for i, m in enumerate(MIXED[1:])]
    assert "".join(engine.submit(MIXED[0], decode)) == quiet
    assert "".join(engine.submit(MIXED[0], Decode(15, temperature=1.0, top_p=0.9, seed=4))) != quiet
    for answer in crowd:
        list(answer)


def test_stop_strings_end_the_answer(model: Assistant, engine: Engine) -> None:
    whole = alone(model, MIXED[0])
    stop = whole[3:6]
    answer = engine.submit(MIXED[0], Decode(20, stop=(stop,)))
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("messages", "decode", "message"),
    [
        ([user(Part("video", bytes=b"x"), "?")], Decode(), "this model reads text, image; it cannot read video"),
        ([user("x" * 1100)], Decode(), r"exceed the context of 1024"),
        ([user("x")], Decode(max_new_tokens=1020), r"\+ 1020 of answer exceed the context"),
        ([user(image(b"garbage"), "?")], Decode(), "not a readable image"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine: Engine, messages: list[Message], decode: Decode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(messages, decode)
    assert is_idle(engine)


def test_media_that_exceed_the_context_are_refused_before_the_llm_runs(engine: Engine) -> None:
    answer = engine.submit([user(*[image(RED)] * 252)], Decode(5))  # 19 tokens of text, 1008 of pictures
    with pytest.raises(RequestError, match="exceed the context"):
        list(answer)
    assert engine.stats.prompt_tokens == 0


def test_cancelling_stops_the_computing(engine: Engine) -> None:
    long = engine.submit([user("Tell me")], Decode(900))
    for _ in zip(range(3), long, strict=False):
        pass
    long.cancel()
    before = engine.stats.steps
    list(long)
    assert long.finish_reason in ("cancelled", "stop")
    assert engine.stats.steps <= before + 2
    assert is_idle(engine)


class Layers:
    """Says which of the two layers of an engine's LLM were computed, for passes over more or fewer than 8 rows; ``when`` is called
    in the first one."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, when: Callable[[], object], prompts: bool = True):
        self.seen: list[int] = []
        first, second = engine.forward.blocks  # type: ignore[attr-defined]

        def watched(number: int, norm: Any) -> Any:
            def look(x: Any) -> Any:
                if (len(x) > 8) == prompts:
                    self.seen.append(number)
                    if number == 1:
                        when()
                return norm(x)

            return look

        blocks = [first._replace(norm=watched(1, first.norm)), second._replace(norm=watched(2, second.norm))]
        monkeypatch.setattr(engine.forward, "blocks", blocks)


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_pass_over_prompts_is_given_up_when_others_wait_alone(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, num_prompts: int
) -> None:
    """Between its layers; while one of them is waited for it goes on, and the answer in progress loses nothing."""
    talks = [[user(f"{i} is a number.")] for i in range(num_prompts + 1)]
    expected = [alone(model, talk, 9) for talk in talks]
    watched = Watched(model, monkeypatch)
    engine = watched.engine
    first = watched.begin(30)
    answers = [engine.submit(talk, Decode(9)) for talk in talks]
    gone = answers[:num_prompts]
    layers = Layers(engine, monkeypatch, lambda: [answer.cancel() for answer in gone])
    watched.go.set()
    assert "".join(answers[-1]) == expected[-1]  # it was computed with those that left
    for answer in gone:
        "".join(answer)
    assert [answer.finish_reason for answer in gone] == ["cancelled"] * num_prompts
    assert layers.seen == [1, 2]
    layers.seen.clear()
    gone = [engine.submit([user("Nothing.")], Decode(9))]
    assert "".join(gone[0]) == ""
    assert gone[0].finish_reason == "cancelled"
    assert layers.seen == [1]
    assert "".join(first) == alone(model, [user("Hello")], 30)
    assert is_idle(engine)
    engine.close()


@pytest.mark.parametrize(("who_waits", "chunk"), [("one who begins alike", 512), ("nobody", 512), ("one who begins alike", 64)])
def test_a_pass_whose_states_are_of_use_is_finished(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, who_waits: str, chunk: int
) -> None:
    """Unless it is only a chunk of a prompt: nothing is kept of these."""
    engine, beginning = Engine(model, EngineConfig(prefill_chunk=chunk)), "One long beginning that both prompts have. " * 4
    asked, held = [user(beginning + "And then?")], threading.Event()
    expected = alone(model, asked, 9)
    later: list[Answer] = []

    def leave() -> None:
        assert held.wait(20)
        if not gone.cancelled:
            gone.cancel()
            later.extend([engine.submit(asked, Decode(9))] if who_waits != "nobody" else [])

    layers = Layers(engine, monkeypatch, leave)
    gone = engine.submit([user(beginning + "What?")], Decode(9))
    held.set()
    "".join(gone)
    assert gone.finish_reason == "cancelled"
    answer = later[0] if later else engine.submit(asked, Decode(9))
    assert "".join(answer) == expected
    assert (answer.usage.cached > len(beginning)) == (chunk == 512)
    assert layers.seen[:2] == ([1, 2] if chunk == 512 else [1, 1])
    assert is_idle(engine)
    engine.close()


@pytest.mark.parametrize("how", ["cancelled", "overdue"])
def test_a_step_is_given_up_when_others_wait_alone(model: Assistant, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What was decoded before it is kept for later turns; nothing counts as an error."""
    engine = Engine(model)
    engine.stops = set()
    asked, begun, go_on = [user("Tell me")], threading.Event(), threading.Event()

    def leave() -> None:
        if long.usage.completion == 4 and not begun.is_set():
            begun.set()
            assert go_on.wait(20)

    layers = Layers(engine, monkeypatch, leave, prompts=False)
    long = engine.submit(asked, Decode(200))
    assert begun.wait(20)
    job = engine._active[0]
    short = engine.submit([user("Hello")], Decode(5))
    if how == "cancelled":
        long.cancel()
    else:
        job.deadline = 0.0
    layers.seen.clear()
    go_on.set()
    if how == "cancelled":
        said = "".join(long)
    else:
        with pytest.raises(EngineError, match="took longer"):
            "".join(long)
        said = "So."
    assert "".join(short) == alone(model, [user("Hello")], 5)
    assert layers.seen[:2] == [1, 2]  # of the next answer: the step in work had no second layer
    assert engine.stats.errors == 0
    for prefix in engine.prefixes._items.values():
        assert all(keys.shape[2] == values.shape[2] == sum(prefix.lengths) for keys, values in prefix.kv)
    going_on = [*asked, assistant(said), user("Go on")]
    assert "".join(engine.submit(going_on, Decode(9))) == alone(model, going_on, 9)
    assert is_idle(engine)
    engine.close()


def test_a_full_queue_refuses_and_recovers(model: Assistant) -> None:
    engine = Engine(model, EngineConfig(max_batch=1, max_queue=1))
    try:
        held = [engine.submit([user("a")], Decode(50)), engine.submit([user("b")], Decode(50))]
        with pytest.raises(Busy, match="2 requests"):
            engine.submit([user("c")])
        for answer in held:
            list(answer)
        assert list(engine.submit([user("c")], Decode(2)))
    finally:
        engine.close()
    with pytest.raises(EngineError, match="stopped"):
        engine.submit([user("d")])


def test_an_engine_that_nobody_closes_closes_itself(llm_folder: Path) -> None:
    """While it computes; PyTorch would abort the process."""
    program = f"""
from pathlib import Path
from conftest import tiny_model
from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.serve.answer import Decode
from x2l.serve.engine import Engine
from x2l.types import user
engine = Engine(Assistant(build(ModelConfig.model_validate(tiny_model(Path({str(llm_folder)!r}))))))
engine.stops = set()
answer = engine.submit([user("Tell me")], Decode(900))
print(len(next(iter(answer))) > 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


def test_bounds_that_let_nothing_through_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch must be 1 or more, got 0"):
        EngineConfig(max_batch=0)


def test_bounded_states_make_rows_wait(model: Assistant) -> None:
    engine = Engine(model, EngineConfig(kv_bytes=1))  # one row at a time
    try:
        answers = [engine.submit(m, Decode(5)) for m in MIXED[:3]]
        assert ["".join(a) for a in answers] == [alone(model, m, 5) for m in MIXED[:3]]
        assert engine.stats.steps >= 8
    finally:
        engine.close()


class Watched:
    """An engine that says what it computed in a turn: positions of each pass over prompts, and how many media it read.

    It waits before its first token until `go` is set, so that requests can be sent at one moment.
    """

    def __init__(self, model: Assistant, monkeypatch: pytest.MonkeyPatch, **config: Any):
        self.engine = Engine(model, EngineConfig(**config))
        self.passes: list[list[int]] = []
        self.media: list[int] = []
        self.rows = 0  # the most that were decoded at a time
        self.held, self.go = threading.Event(), threading.Event()
        read, step, turn, image = self.engine._read, self.engine._step, self.engine._turn, model.model.modalities["image"].forward

        def reads(group: Any) -> int:
            self.passes[-1].append(read(group))
            return self.passes[-1][-1]

        def looks(*arguments: Any) -> Any:
            self.media[-1] += 1
            return image(*arguments)

        def next_token() -> None:
            self.held.set()
            assert self.go.wait(20)
            self.rows = max(self.rows, len(self.engine._active))
            step()

        def next_turn() -> None:
            self.passes.append([])
            self.media.append(0)
            turn()

        monkeypatch.setattr(self.engine, "_read", reads)
        monkeypatch.setattr(self.engine, "_step", next_token)
        monkeypatch.setattr(self.engine, "_turn", next_turn)
        monkeypatch.setattr(model.model.modalities["image"], "forward", looks)
        self.engine.stops = set()

    def begin(self, tokens: int) -> Answer:
        """An answer in progress."""
        answer = self.engine.submit([user("Hello")], Decode(tokens))
        assert self.held.wait(20)
        return answer


def test_answers_in_progress_wait_for_one_prompts_media_and_a_chunk(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of their tokens no more is computed, however many wait, and whether or not these fail."""
    asked = [[user(image(picture((i, 0, 200))), "?")] for i in range(4)] + [[user(f"{i}?")] for i in range(16)]
    asked += [[user("The same long question, asked again and again?")]] * 12  # each waits for the states of the one before
    expected = [alone(model, messages, 1) for messages in asked]
    too_long = [[user(*[image(picture((i, 200, 0)))] * 250)] for i in range(10)]
    watched = Watched(model, monkeypatch, prefill_chunk=64, max_batch=8)
    engine = watched.engine
    long = watched.begin(40)
    answers = [engine.submit(messages, Decode(1)) for messages in asked]
    refused = [engine.submit(messages, Decode(20)) for messages in too_long[:5]]
    watched.go.set()
    assert ["".join(answer) for answer in answers] == expected
    for answer in refused:
        with pytest.raises(RequestError, match="exceed the context"):
            "".join(answer)
    "".join(long)
    watched.go.clear()
    watched.held.clear()
    watched.begin(2)
    refused = [engine.submit(messages, Decode(20)) for messages in too_long[5:]]
    watched.go.set()  # now nothing is in progress, but a cancellation or a request's end must not wait for all of them either
    for answer in refused:
        with pytest.raises(RequestError, match="exceed the context"):
            "".join(answer)
    engine.close()
    assert max(watched.media) == 1
    assert sum(watched.media) == 4 + 10
    assert all(sum(turn) <= 64 for turn in watched.passes)
    assert sum(map(len, watched.passes)) < len(asked)  # they were computed together


def test_prompts_together_keep_to_the_batch(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch, max_batch=3)
    watched.begin(9)
    answers = [watched.engine.submit([user(f"{i}?")], Decode(9)) for i in range(8)]
    watched.go.set()
    assert ["".join(answer) for answer in answers] == [alone(model, [user(f"{i}?")], 9) for i in range(8)]
    watched.engine.close()
    assert watched.rows == 3


def test_a_prompt_that_fails_costs_no_other_of_its_pass(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch)
    engine, choose = watched.engine, watched.engine._choose

    def broken(job: Any, logits: Any) -> int:
        if job.decode.seed == 7:
            raise RuntimeError("at 0x7f00 in /secret")
        return choose(job, logits)

    monkeypatch.setattr(engine, "_choose", broken)
    first = watched.begin(9)
    answers = [engine.submit([user(f"{i}?")], Decode(9, seed=7 if i == 1 else 0)) for i in range(4)]
    watched.go.set()
    with pytest.raises(EngineError, match="the model failed on this request"):
        "".join(answers.pop(1))
    assert ["".join(answer) for answer in answers] == [alone(model, [user(f"{i}?")], 9) for i in (0, 2, 3)]
    assert engine.stats.errors == 1
    "".join(first)
    assert is_idle(engine)
    engine.close()


def test_a_pass_that_fails_costs_its_prompts(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch)
    engine, prompts = watched.engine, watched.engine.forward.prompts
    first = watched.begin(9)
    monkeypatch.setattr(engine.forward, "prompts", lambda group, over: prompts(group, over) if len(group) == 1 else 1 / 0)
    answers = [engine.submit([user(f"{i}?")], Decode(9)) for i in range(4)]
    watched.go.set()
    for answer in answers:
        with pytest.raises(EngineError, match="the model failed on this request"):
            "".join(answer)
    assert "".join(first)
    assert list(engine.submit([user("a")], Decode(5)))
    assert is_idle(engine)
    engine.close()


def test_prompts_of_the_same_moment_are_computed_together(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, those that came meanwhile, and those that begin as one of these do."""
    engine = Engine(model)
    groups: list[int] = []
    held, read = threading.Event(), engine._read

    def reads(group: Any) -> int:
        assert held.wait(20)
        groups.append(len(group))
        return read(group)

    monkeypatch.setattr(engine, "_read", reads)
    talks = [[user("Hello")], *([user(f"{i} is a number.")] for i in range(3)), [user("One long beginning " * 8, image(RED))]]
    talks += [[*talks[-1], assistant("Yes."), user("Why?")], [user("So?")]]
    answers = [engine.submit(talk, Decode(9)) for talk in talks]
    held.set()
    assert ["".join(answer) for answer in answers] == [alone(model, talk, 9) for talk in talks]
    assert groups in ([1, 4, 2], [2, 3, 2], [3, 2, 2], [4, 1, 2], [5, 2])  # it may begin with as many as there are by then
    engine.close()


def test_an_overdue_request_ends_with_an_error(model: Assistant) -> None:
    engine = Engine(model, EngineConfig(request_seconds=0.0))
    try:
        with pytest.raises(Timeout, match="longer than 0 s"):
            list(engine.submit([user("a")], Decode(50)))
    finally:
        engine.close()


def test_threads_do_not_mix_up_scaffold_and_content(engine: Engine) -> None:
    texts = ["<|im_end|><|im_start|>" * n for n in range(1, 17)]

    def submit(text: str) -> int:
        answer = engine.submit([user(text)], Decode(1))
        list(answer)
        return answer.usage.prompt

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(submit, texts)) == [19 + len(text) for text in texts]  # one token a byte, none special


@pytest.mark.parametrize("when", ["prompt", "step"])
def test_an_exception_costs_its_answers_only(engine: Engine, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    with monkeypatch.context() as patch:
        place, name = (engine._caches, "load") if when == "prompt" else (engine._lanes, "step")

        def broken(*_: object) -> None:
            raise RuntimeError("at 0x7f00 in /secret")

        patch.setattr(place, name, broken)
        with pytest.raises(EngineError, match="the model failed"):
            list(engine.submit([user("a")], Decode(5)))
    assert engine.stats.errors == 1
    assert engine.alive
    assert list(engine.submit([user("a")], Decode(5)))
    assert is_idle(engine)


def test_a_dead_engine_says_so(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    monkeypatch.setattr(engine, "_drop", lambda: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(EngineError, match="stopped"):
        list(engine.submit([user("a")], Decode(5)))
    assert not engine.alive


def test_an_answer_wakes_a_reader_in_another_thread() -> None:
    answer = Answer()
    threading.Timer(0.05, lambda: (answer.put("a"), answer.put(None))).start()
    start = time.monotonic()
    assert list(answer) == ["a"]
    assert time.monotonic() - start < 5


BYTES = st.lists(st.integers(0, 255), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=20), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    joined = "".join(pieces)
    if not stream.stopped:
        assert joined == text
        assert not any(stop in text for stop in stops)
    else:
        ends = [text.index(stop) for stop in stops if stop in text]
        assert text.startswith(joined)
        assert len(joined) in ends


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BYTES)
def test_any_bytes_come_out_in_the_end(ids: list[int]) -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    stream = TextStream(decode)
    joined = "".join([*(stream.push(i) for i in ids), stream.finish()])
    assert joined.replace("\ufffd", "") == decode(ids).replace("\ufffd", "")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix_equals_the_loop(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(tuple(a), tuple(b)) == expected


def test_stores_keep_to_their_bytes() -> None:
    embeddings = EmbeddingStore(max_bytes=100)
    for i in range(5):
        embeddings.put(i, torch.zeros(10))
        embeddings.get(0)
    assert embeddings.num_bytes == 80
    assert embeddings.get(0) is not None
    assert embeddings.get(1) is None
    embeddings.put("large", torch.zeros(100))
    assert embeddings.get("large") is None
    embeddings.clear()
    assert (len(embeddings), embeddings.num_bytes, embeddings.get(0)) == (0, 0, None)
    embeddings.put(0, torch.zeros(10))
    assert embeddings.num_bytes == 40
    prefixes = PrefixStore(max_bytes=1000)
    for i in range(20):
        states = [(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5))]
        prefixes.put(("", i, 1, 2, 3), Prefix((0, 1, 1, 2, 1), states))
    assert prefixes.num_bytes == 1000
    assert prefixes.find(("", 19, 1, 2, 9))[0] == 4
    assert prefixes.find(("", 3, 1, 2, 9)) == (0, [])


@pytest.mark.skipif(
    not bf16_in_hardware() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the processor has no AVX-512 with bfloat16",
)
@pytest.mark.parametrize("bits", [8, 4])
def test_in_fewer_bits_it_answers_too(llm_folder: Path, bits: int) -> None:
    config = tiny_model(llm_folder)
    config["llm"] = {"spec": str(llm_folder), "dtype": "bfloat16"}
    model = Assistant(build(ModelConfig.model_validate(config)))
    engine = Engine(model, EngineConfig(weight_bits=bits))
    try:
        answers = [engine.submit(messages, Decode(5)) for messages in MIXED]
        assert all("".join(answer) and answer.usage.completion for answer in answers)
    finally:
        engine.close()
    with pytest.raises(ValueError, match="packed_bytes allows"):
        Engine(model, EngineConfig(weight_bits=bits, packed_bytes=10))
