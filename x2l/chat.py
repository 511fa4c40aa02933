"""The conversation in a terminal: streamed answers, and media attached by slash commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from x2l.assistant import Assistant
from x2l.data.collate import raw
from x2l.types import Message, Part, assistant, user

HELP = (
    "/image, /video, /speech or /audio PATH attaches a file · /clear forgets the conversation · /help · /exit   (图片：/image 路径)"
)


class Chat:
    """One conversation.

    Args:
        model: an `Assistant`.
        decode: keyword arguments of its ``stream``.
        console: where it prints.
    """

    def __init__(self, model: Assistant, decode: dict[str, Any], console: Console):
        self.model, self.decode, self.console = model, decode, console
        self.messages: list[Message] = []
        self.waiting: list[Part] = []

    def attach(self, modality: str, path: Path) -> None:
        """Put a media file in front of the next question.

        Raises:
            ValueError: this model does not read it, or the file is missing or broken; nothing is attached then.
        """
        if modality not in self.model.reads:
            raise ValueError(f"this model reads {', '.join(self.model.reads)}, not {modality}")
        part = Part(modality, bytes=raw(Part(modality, path=str(path))))
        self.model.collator.process(modality, [raw(part)])
        self.waiting.append(part)

    def ask(self, question: str = "") -> str:
        """Stream the answer to a question about everything said and shown so far; failed turns leave no trace.

        Without a text, what is attached is the question: a recording of it.
        """
        turn = user(*self.waiting, *([question] if question else []))
        pieces = []
        for piece in self.model.stream([*self.messages, turn], **self.decode):
            pieces.append(piece)
            self.console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
        self.console.print()
        if not "".join(pieces).strip():
            self.console.print(
                "(the model has no answer: ask in other words, or with a shorter recording)", style="dim", highlight=False
            )
        self.messages += [turn, assistant("".join(pieces).strip())]
        self.waiting = []
        return "".join(pieces)

    def loop(self) -> None:
        """Read lines until /exit or the end of input."""
        self.console.print(HELP, style="dim", highlight=False)
        while True:
            try:
                line = self.console.input("[bold cyan]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/exit", "/quit"):
                return
            try:
                self._obey(line)
            except ValueError as error:
                self.console.print(f"error: {error}", style="red", highlight=False, markup=False)
            except KeyboardInterrupt:
                self.console.print(" (stopped)", style="dim")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/help":
            self.console.print(HELP, style="dim", highlight=False)
        elif command == "/clear":
            self.messages, self.waiting = [], []
        elif command.removeprefix("/") in self.model.reads and command.startswith("/"):
            if not argument.strip():
                raise ValueError(f"{command} needs the path of a file")
            self.attach(command[1:], Path(argument.strip()).expanduser())
            empty = ", or press Enter to have it answered" if command == "/speech" else ""
            self.console.print(f"attached {argument.strip()}; ask about it{empty}", style="dim", highlight=False)
        elif command.startswith("/"):
            raise ValueError(f"unknown command {command!r}; {HELP}")
        elif line or any(part.type == "speech" for part in self.waiting):
            self.ask(line)
