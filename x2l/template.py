"""Messages -> token ids with sentinels, labels by prefix rendering, for training and inference alike.

A template turns messages into segments: scaffold text (its special tokens count), content text (a user's; special tokens in it
are plain text), and media. Sentinels are negative ids, so nothing that a user types can become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from x2l.types import IGNORE_INDEX, Message, Part, Sample


class Segment(NamedTuple):
    """A piece of a rendered prompt: scaffold (``part`` is None) or a content part."""

    text: str
    part: Part | None = None


class Row(NamedTuple):
    """One rendered sample, not yet padded; ``media`` holds its media parts in reading order."""

    ids: list[int]
    labels: list[int]
    media: list[Part]

    @property
    def text_length(self) -> int:
        return sum(i >= 0 for i in self.ids)

    def upto(self, part: Part, and_it: bool = False) -> Row:
        """What stands before one of the media, given as the same object; and this one, if so asked.

        Raises:
            ValueError: nothing does.
        """
        number = next(i for i, mine in enumerate(self.media) if mine is part)
        place = [at for at, i in enumerate(self.ids) if i < 0][number]
        if not place:
            raise ValueError(f"nothing stands before the {part.type}")
        place, number = place + and_it, number + and_it
        return Row(self.ids[:place], self.labels[:place], self.media[:number])


class Template(Protocol):
    """Messages -> segments; with ``generate`` the last one opens the assistant's turn."""

    def __call__(self, messages: Sequence[Message], generate: bool) -> list[Segment]: ...


class ChatTemplate:
    """The LLM's own chat template, with media where they stand in the user's message.

    Args:
        tokenizer: a Hugging Face tokenizer that has a chat template.
        system: put before conversations that have no system message; None leaves the LLM's default.
    """

    def __init__(self, tokenizer: Any, system: str | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this LLM has no chat template; use `template: {name: paper}` in the recipe")
        self.tokenizer, self.system = tokenizer, system

    def __call__(self, messages: Sequence[Message], generate: bool) -> list[Segment]:
        if self.system is not None and messages[0].role != "system":
            messages = [Message("system", (Part("text", text=self.system),)), *messages]
        parts = [part for message in messages for part in message.content]
        mark = _unused_mark(part.text or "" for part in parts)
        # Every part becomes a numbered mark, so that the template's own text and the contents can be told apart afterwards.
        numbers = iter(range(len(parts)))
        marked = [{"role": m.role, "content": "".join(mark.format(next(numbers)) for _ in m.content)} for m in messages]
        text = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generate)
        segments = []
        for number, part in enumerate(parts):
            before, found, text = text.partition(mark.format(number))
            if not found:
                raise ValueError("the chat template of this LLM drops or reorders messages; use `template: {name: paper}`")
            segments += [Segment(before), Segment(part.text or "", part)]
        return [*segments, Segment(text)]


class PaperTemplate:
    r"""The paper's prompt: ``<Image>..</Image><Video>..</Video><Speech>..</Speech>Question: .. \n Answer:`` (section 3.3).

    Media come first, each between its markers; a later turn follows after a line break.

    Args:
        eos: text that ends an answer, normally the tokenizer's eos token.
    """

    def __init__(self, eos: str):
        self.eos = eos

    def __call__(self, messages: Sequence[Message], generate: bool) -> list[Segment]:
        segments: list[Segment] = []
        for message in messages:
            texts = [Segment(part.text or "", part) for part in message.content if part.type == "text"]
            if message.role == "user":
                for part in message.content:
                    if part.type != "text":
                        name = part.type.capitalize()
                        segments += [Segment(f"<{name}>"), Segment("", part), Segment(f"</{name}>")]
                segments += [Segment("Question: "), *texts, Segment(" \n Answer:")]
            elif message.role == "assistant":
                segments += [Segment(" "), *texts, Segment(f"{self.eos}\n")]
            else:
                segments += [*texts, Segment("\n")]
        return segments


TEMPLATES = {"chat": ChatTemplate, "paper": PaperTemplate}


class Renderer:
    """Samples -> rows of ids and labels, for one tokenizer, template and set of modalities.

    Args:
        tokenizer: the LLM's.
        template: a `Template`.
        sentinels: modality name -> its negative id.
        begin: ids that open every row (a BOS token, where the LLM wants one and its template does not write it).
    """

    def __init__(self, tokenizer: Any, template: Template, sentinels: dict[str, int], begin: Sequence[int] = ()):
        self.tokenizer, self.template, self.sentinels, self.begin = tokenizer, template, sentinels, list(begin)

    def prompt(self, messages: Sequence[Message]) -> Row:
        """The row from which the LLM goes on to answer; nothing is supervised."""
        ids = self._ids(self._segments(messages, generate=True))
        return Row(ids, [IGNORE_INDEX] * len(ids), [p for m in messages for p in m.content if p.type != "text"])

    def train(self, sample: Sample) -> Row:
        """The whole conversation; each assistant turn is supervised, up to and with its end-of-turn token.

        The prompt of a turn is rendered exactly as `prompt` renders it, and must be a prefix of the conversation.

        Raises:
            ValueError: the conversation has no assistant turn, or the template rewrites earlier turns.
        """
        ids: list[int] = []
        labels: list[int] = []
        for turn, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            prompt = self._ids(self._segments(sample.messages[:turn], generate=True))
            whole = self._ids(self._segments(sample.messages[: turn + 1], generate=False))
            if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise ValueError(f"sample {sample.id}: turn {turn} does not extend its own prompt under this template")
            answer = whole[len(prompt) :]
            end = answer.index(self.eos) + 1 if self.eos in answer else len(answer)
            labels += [IGNORE_INDEX] * (len(prompt) - len(ids)) + answer[:end] + [IGNORE_INDEX] * (len(answer) - end)
            ids = whole
        if not ids:
            raise ValueError(f"sample {sample.id} has no assistant turn to learn from")
        last = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
        return Row(ids[:last], labels[:last], sample.media)

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _segments(self, messages: Sequence[Message], generate: bool) -> list[Segment]:
        # Neighbouring scaffold is joined before it is tokenised, so that a template's pieces do not change its tokens.
        joined: list[Segment] = []
        for segment in self.template(messages, generate):
            if segment.part is None and joined and joined[-1].part is None:
                joined[-1] = Segment(joined[-1].text + segment.text)
            else:
                joined.append(segment)
        return joined

    def _ids(self, segments: list[Segment]) -> list[int]:
        ids = list(self.begin)
        for text, part in segments:
            if part is not None and part.type != "text":
                if part.type not in self.sentinels:
                    raise ValueError(f"this model reads {sorted(self.sentinels) or 'no media'}, not {part.type!r}")
                ids.append(self.sentinels[part.type])
            else:
                ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=part is not None)["input_ids"]
        return ids


def _unused_mark(texts: Any) -> str:
    """A format string for numbered marks that occur in none of ``texts``."""
    everything = "\n".join(texts)
    salt = 0
    while f"[[{salt}:" in everything:
        salt += 1
    return f"[[{salt}:{{}}]]"
