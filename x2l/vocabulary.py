"""The tokens of an LLM that a speech recogniser writes in, and how they are spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

HAN = "\u4e00-\u9fff"
SPOKEN = re.compile(rf"[{HAN}]|[^\s{HAN}][^{HAN}]*")  # one Han character, or words between them


def spoken_form(text: str) -> str:
    """A transcript as it is spoken: lower case, letters and apostrophes alone, words apart by one space."""
    return " ".join(re.sub(r"[^\w' ]|[\d_]", " ", text.lower().replace("’", "'")).split())


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of an LLM in which the ASR model writes, so that one embedding is one token of the LLM.

    Attributes:
        token_ids: the LLM's ids; their index is the token of the ASR model.
        texts: their texts.
    """

    token_ids: list[int]
    texts: list[str]

    @classmethod
    def of(cls, tokenizer: Any, pattern: str = r" ?[a-z']+") -> Vocabulary:
        """All tokens of a Hugging Face tokenizer whose whole text matches ``pattern``."""
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        found = [(i, text) for i, text in enumerate(texts) if re.fullmatch(pattern, text)]
        if not found:
            raise ValueError(f"no token of this LLM matches {pattern!r}")
        return cls(*map(list, zip(*found, strict=True)))

    @cached_property
    def _index(self) -> dict[int, int]:
        return {token: i for i, token in enumerate(self.token_ids)}

    @property
    def spelling(self) -> Tensor:
        """(V, K) letters of each token from 1, right-padded with 0: the CTC targets."""
        letters = {letter: i for i, letter in enumerate(sorted({*"".join(self.texts)}), start=1)}
        rows = [torch.tensor([letters[letter] for letter in text]) for text in self.texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """The tokens of a transcript in `spoken_form`: each word after a space, each Han character by itself.

        A token that the vocabulary lacks is spelled, if the vocabulary has its letters.

        Raises:
            ValueError: the transcript is empty, or holds a token outside the vocabulary; the message names it.
        """
        index = self._index
        pieces = [piece if re.match(f"[{HAN}]", piece) else f" {piece.strip()}" for piece in SPOKEN.findall(spoken_form(text))]

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        whole = [i for piece in pieces for i in tokens(piece)]
        ids = [j for i in whole for j in ([i] if i in index else chain(*map(tokens, tokenizer.decode([i]).strip())))]
        foreign = [tokenizer.decode([i]) for i in ids if i not in index]
        if foreign or not ids:
            raise ValueError(f"the transcript {text!r} has no tokens, or tokens outside the vocabulary: {foreign}")
        return [index[i] for i in ids]


def spelled_rows(table: Tensor, pieces: list[bytes], texts: Sequence[str]) -> Tensor:
    """For each text the mean row (len(texts), C) of the pieces that spell it, longest first; ``table`` is (len(pieces), C).

    Raises:
        ValueError: a part of a text is no piece.
    """
    ids = piece_ids(pieces)
    return torch.stack([table[spell(text, ids)].mean(0) for text in texts])


def piece_ids(pieces: list[bytes]) -> dict[bytes, int]:
    """The id of each of Moonshine's tokens, the special ones (``<s>``) left out."""
    return {piece: i for i, piece in reversed(list(enumerate(pieces))) if not piece.startswith(b"<")}


def spell(text: str, ids: dict[bytes, int]) -> list[int]:
    """Ids of the pieces of ``text``, the longest first at each place.

    Raises:
        ValueError: a part of it is no piece.
    """
    spelled, found, at = text.replace(" ", "\u2581").encode(), list[int](), 0
    while at < len(spelled):
        end = next((end for end in range(len(spelled), at, -1) if spelled[at:end] in ids), None)
        if end is None:
            raise ValueError(f"no Moonshine token begins {spelled[at:]!r}")
        found.append(ids[spelled[at:end]])
        at = end
    return found
