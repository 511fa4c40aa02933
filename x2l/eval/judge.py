"""The judge: any OpenAI-compatible endpoint or a local model, asked once for each judgement and never twice.

Environment: ``X2L_JUDGE_URL`` (such as https://host/v1), ``X2L_JUDGE_MODEL``, ``X2L_JUDGE_KEY``. The key goes into one
request header and nowhere else: not into records, messages or logs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from tqdm import tqdm

from x2l.data.transforms.translate import Translator
from x2l.data.transforms.translators import NAMES, OPUS_ZH_EN, OPUS_ZH_EN_SHA256, CTranslate2Translator
from x2l.endpoint import ChatEndpoint, EndpointError
from x2l.eval import llava_bench, records
from x2l.eval.llava_bench import Question
from x2l.types import Message, Part, Sample, user

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE, MAX_TOKENS = 0.2, 1024  # LLaVA's
DECODE = {"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
Row = dict[str, Any]


class JudgeError(ValueError):
    """The judge cannot be asked; what was answered so far is stored."""


class Chat(Protocol):
    """Anything that completes a system line and a user message."""

    @property
    def name(self) -> str:
        """The model, as it is recorded."""

    def complete(self, system: str, message: str, temperature: float, max_tokens: int) -> str:
        """The reply."""


class Endpoint:
    """A chat-completions endpoint as a judge; the client is `x2l.endpoint.ChatEndpoint`."""

    def __init__(self, url: str, model: str, timeout: float = 300.0):
        self.name, self._chat = model, ChatEndpoint(url, model, "X2L_JUDGE_KEY", timeout)

    @classmethod
    def from_env(cls) -> Endpoint:
        """The endpoint that the environment names.

        Raises:
            JudgeError: X2L_JUDGE_URL or X2L_JUDGE_MODEL is not set.
        """
        missing = [name for name in ("X2L_JUDGE_URL", "X2L_JUDGE_MODEL") if not os.environ.get(name)]
        if missing:
            raise JudgeError(f"no judge: set {' and '.join(missing)} (and X2L_JUDGE_KEY, if it asks for a key)")
        return cls(os.environ["X2L_JUDGE_URL"], os.environ["X2L_JUDGE_MODEL"])

    def complete(self, system: str, message: str, temperature: float, max_tokens: int) -> str:
        """The text of the first choice.

        Raises:
            JudgeError: refused, or no answer after all attempts.
        """
        turns = [{"role": "system", "content": system}, {"role": "user", "content": message}]
        try:
            return self._chat.complete(turns, temperature=temperature, max_tokens=max_tokens).text
        except EndpointError as error:
            raise JudgeError(f"the judge: {error}") from error


class LocalChat:
    """A local model as a judge or a translator: anything with ``generate_text``."""

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name

    def complete(self, system: str, message: str, temperature: float, max_tokens: int) -> str:
        sample = Sample("judge", (Message("system", (Part("text", text=system),)), user(message)))
        answers: list[str] = self.model.generate_text([sample], temperature=temperature, max_new_tokens=max_tokens)
        return answers[0]


class ChatTranslator:
    """A translator that asks a chat model; greedy, so that the same answer gives the same text."""

    def __init__(self, chat: Chat):
        self.chat, self.name = chat, f"chat {chat.name}"

    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        system = f"Translate the user's text from {NAMES[source]} into {NAMES[target]}. Reply with the translation alone."
        return [self.chat.complete(system, text, temperature=0.0, max_tokens=1024) for text in texts], Counter()


def find_translator(name: str, chat: Chat) -> Translator:
    """``judge`` (its own model), ``opus`` (OPUS-MT from the package index), or the folder of a model for CTranslate2."""
    if name == "judge":
        return ChatTranslator(chat)
    return CTranslate2Translator(OPUS_ZH_EN, OPUS_ZH_EN_SHA256) if name == "opus" else CTranslate2Translator(name)


def judge(
    questions: Sequence[Question],
    references: Mapping[int, str],
    candidates: Mapping[int, str],
    chat: Chat,
    out_dir: str | Path,
    mode: str = "robust",
    translator: Translator | None = None,
    workers: int = 4,
) -> Path:
    """Ask for every judgement that has no record yet; returns the folder for :func:`score`.

    A judgement is known by the hash of its message, judge, order and draw, so that an interrupted run goes on where it
    stopped and a changed prompt is asked anew. (LLaVA's own resume by line number is not reproduced in any mode.)

    Args:
        references, candidates: answers by question id. ``paper`` pairs the files by line and stops at the shortest.
        translator: from Chinese into English, applied to candidate answers; both texts are stored.

    Raises:
        ValueError: ``robust`` and a question without an answer.
        JudgeError: the judge cannot be asked.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = _translations(candidates, translator, out_dir / "translations.jsonl")
    plan = _plan(questions, references, candidates, texts, chat.name, mode)
    names = {"judge": chat.name, "translator": translator and translator.name}
    identity = {"task": "llava_bench_coco", "mode": mode, **names, "system": SYSTEM, "decode": DECODE}
    records.write_json(out_dir / "run.json", {**identity, "num_judgements": len(plan), **records.environment()})
    records.write_jsonl(out_dir / "task.jsonl", plan)
    done = {row["key"] for row in records.read(out_dir / "judgements.jsonl")}
    todo = [row for row in plan if row["key"] not in done]

    lock = Lock()

    def ask(row: Row) -> None:
        reply = chat.complete(SYSTEM, row["message"], TEMPERATURE, MAX_TOKENS)
        status = llava_bench.find_mode(mode).parse(reply).status
        with lock:  # stored by the worker at once: a paid reply must not wait in memory
            found = {**row, "judge": chat.name, "decode": DECODE, "reply": reply, "status": status}
            records.append(out_dir / "judgements.jsonl", [found])

    bar = tqdm(total=len(plan), initial=len(plan) - len(todo), desc=f"judge {mode}")
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(ask, row) for row in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return out_dir


def score(out_dir: str | Path, seed: int = 0) -> Row:
    """Summarise stored judgements, no judge needed; those still missing count against the coverage."""
    out_dir = Path(out_dir)
    replies = {row["key"]: row["reply"] for row in records.read(out_dir / "judgements.jsonl")}
    plan = records.read(out_dir / "task.jsonl")
    mode = records.read_json(out_dir / "run.json")["mode"]
    summary = llava_bench.summarise([{**row, "reply": replies.get(row["key"])} for row in plan], mode, seed)
    records.write_json(out_dir / "scores.json", summary)
    return summary


def _translations(answers: Mapping[int, str], translator: Translator | None, path: Path) -> Mapping[int, str]:
    """Each answer translated once by this translator; stored, so that a resumed run does not translate again."""
    if translator is None:
        return answers
    known = {row["sha256"]: row["translated"] for row in records.read(path) if row["translator"] == translator.name}
    for text in answers.values():
        key = records.sha256(text)
        if key not in known:
            (known[key],), _ = translator.translate([text], "zh", "en")
            records.append(path, [{"sha256": key, "translator": translator.name, "text": text, "translated": known[key]}])
    return {question_id: known[records.sha256(text)] for question_id, text in answers.items()}


def _plan(
    questions: Sequence[Question],
    references: Mapping[int, str],
    candidates: Mapping[int, str],
    texts: Mapping[int, str],
    judge_name: str,
    mode: str,
) -> list[Row]:
    if mode == "paper":
        triples = [(q, r, c) for q, r, c in zip(questions, references, candidates, strict=False)]
    else:
        missing = [q.id for q in questions if q.id not in references or q.id not in candidates]
        if missing:
            raise ValueError(f"no answer to questions {missing[:10]}: predict them first, or judge in the paper mode")
        triples = [(q, q.id, q.id) for q in questions]
    orders, draws, _ = llava_bench.find_mode(mode)
    rows = []
    for question, reference_id, candidate_id in triples:
        for order in orders:
            pair = (references[reference_id], texts[candidate_id])
            message = llava_bench.judge_message(question, *(pair if order == "reference-first" else pair[::-1]))
            for draw in range(draws):
                request = {"message": message, "system": SYSTEM, "decode": DECODE, "judge": judge_name}
                rows.append(
                    {
                        "key": records.sha256({**request, "question_id": question.id, "order": order, "draw": draw}),
                        "question_id": question.id,
                        "image": question.image,
                        "category": question.category,
                        "order": order,
                        "draw": draw,
                        "raw": candidates[candidate_id],
                        "translated": texts[candidate_id],
                        "message_sha256": records.sha256(message.encode()),
                        "message": message,
                    }
                )
    return rows
