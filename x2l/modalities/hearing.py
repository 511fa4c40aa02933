"""A recording that is read while it is made: what was heard a while ago is settled, and only what came since is read again.

Encoder, listener and C-Former attend to a whole recording, so that each new sound may change all of its embeddings; but sound
that comes long after a frame changes little in it. Every `STEP` the frames with ``lookahead`` seconds of sound behind them are
settled, and with them the tokens that CIF has fired there: layers keep their keys and values (`x2l.modalities.growing`), CIF its
state (`CIF.stream`), and the LLM may take the embeddings in. What is left to read at the end are ``lookahead`` seconds, or a
`STEP` more, and of the C-Former's passes mostly one: the words of the last step are those that it begins with. Not in the paper,
where CIF could stream but what surrounds it does not.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from x2l.encoders.moonshine import HOP, RATE
from x2l.interfaces.cif import CIF
from x2l.modalities.growing import GrowingEncoder, GrowingListener, GrowingReader
from x2l.modalities.reader import Reader
from x2l.modalities.speech import side_by_side
from x2l.modality import Modality
from x2l.packed import ROWS
from x2l.past import Past
from x2l.types import Features

STEP = RATE // 2  # samples after which something is settled
MOST_TOKENS = 8  # a second, of fast speech


def can_settle(modality: Modality) -> bool:
    """Whether a speech modality's parts can go on after what is settled: Moonshine's encoder in torch, a `Reader` that reads again
    with the words that it understood, soft words."""
    again = any(isinstance(part, Reader) and part.again > 0 and len(part.blocks) > 0 for part in modality.interface)
    return again and hasattr(type(modality.encoder), "in_torch")  # the encoder's own would be built to look


class Parts(NamedTuple):
    """A recording to frames, frames to what CIF integrates, what it fires to what is read, and that to embeddings."""

    encoder: GrowingEncoder
    listener: GrowingListener
    cif: CIF
    reader: GrowingReader
    adapter: nn.Module


class GrowingSpeech:
    """A speech modality that `can_settle`, for recordings that grow, with the weights that it has when it first hears something."""

    def __init__(self, modality: Modality) -> None:
        encoder: Any = modality.encoder
        interface: Any = modality.interface
        self._encoder, (self._listener, self._reader, self._adapter) = encoder, interface
        self.stride, self.num_parts, self.width = self._listener.stride, self._listener.parts, self._listener.cif.width
        self.max_frames = int(encoder.max_seconds * RATE / HOP)  # that the encoder sees at once
        self._making = threading.Lock()
        self._made: Parts | None = None

    @property
    def nothing(self) -> Tensor:
        """No embeddings, (0, D), where the weights are."""
        weight: Tensor = self._adapter.linear.weight
        return weight.new_zeros(0, len(weight))

    @property
    def made(self) -> Parts:
        """Its parts; made from copies, since recordings that come as files may move the encoder, and training changes weights."""
        with self._making:
            if self._made is None:
                words = {id(self._reader.words): self._reader.words}
                listener, reader, adapter = copy.deepcopy((self._listener, self._reader, self._adapter), words)
                network = copy.deepcopy(self._encoder.in_torch).to(self.nothing.device)
                self._made = Parts(GrowingEncoder(network), GrowingListener(listener), listener.cif, GrowingReader(reader), adapter)
            return self._made

    @torch.inference_mode()
    def open(self, lookahead: float) -> None:
        """Make what is made when something is heard; oneDNN compiles the products for reads with so much ``lookahead`` or less."""
        encoder, listener, _, reader, adapter = self.made
        seconds = lookahead + STEP / RATE
        for num_frames in range(8, round(seconds * RATE) // HOP + 8, 8):
            listener(encoder(torch.zeros(num_frames * HOP), Past()), Past())
        for num_tokens in range(1, round(seconds * MOST_TOKENS), max(1, ROWS // self.num_parts)):
            heard = self.nothing.new_zeros(num_tokens, self.num_parts * self.width)
            read = reader(heard, Past(), Past(), heard[:0, : self.width])
            adapter(Features(read[None], torch.tensor([num_tokens], device=read.device)))


class Hearing:
    """What a speech modality makes of one recording (S,) that grows: of its samples, however they come in.

    A step that fails leaves all as it was before; `read` keeps the steps that it has taken.

    Args:
        speech: reads it.
        lookahead: seconds of sound after a frame before it is settled.
    """

    def __init__(self, speech: GrowingSpeech, lookahead: float) -> None:
        self.speech, self.lookahead = speech, round(lookahead * RATE)  # in samples
        self.samples = 0  # of which something was settled for the last time
        self.settled: list[Tensor] = []  # embeddings (U, D), by the steps that settled any
        # What the last step did not settle, and the words of all tokens as it read them.
        self._rest = speech.nothing
        self._said = speech.nothing.new_zeros(0, speech.width)
        # Frames of the encoder and of the listener, CIF and what has fired, pieces and tokens of the reader.
        self._frames, self._context, self._pieces, self._tokens = Past(limit=speech.max_frames), Past(), Past(), Past()
        self._cif: Any = None
        self._fires = speech.nothing.new_zeros(1, 0, speech.width)

    def step(self, wave: Tensor) -> None:
        """Settle what can be after the next `STEP`.

        Raises:
            ValueError: the recording is shorter than that.
        """
        samples = self.samples + STEP
        if len(wave) < samples:
            raise ValueError(f"a recording of {len(wave)} samples, to be settled after {samples}")
        frames, read = self._read(wave[:samples])
        said = self._spoken(read)
        self._rest = self._settle(frames, read, max(0, samples - self.lookahead) // (HOP * self.speech.stride))
        self._said = said
        self.samples = samples

    def read(self, wave: Tensor) -> tuple[list[Tensor], Tensor]:
        """The embeddings of the recording so far, which begins with what earlier calls were given: those that are settled, and
        the rest (U, D).

        Raises:
            ValueError: something was settled when more than that had come.
        """
        if len(wave) < self.samples:
            raise ValueError(f"a recording of {len(wave)} samples, of which {self.samples} were read already")
        while len(wave) - self.samples >= STEP:
            self.step(wave)
        if len(wave) == self.samples:
            return list(self.settled), self._rest
        return list(self.settled), self._settle(*self._read(wave), self._context.length)

    @torch.inference_mode()
    def _read(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after the settled places: frames (F, C) that CIF integrates, and what the reader gives of tokens (U, C)."""
        for past in (self._frames, self._context, self._pieces, self._tokens):
            past.begin()
        encoder, listener, cif, reader, _ = self.speech.made
        frames = listener(encoder(wave, self._frames), self._context)
        fired, _ = cif.stream(self._cif, frames[None], last=True)
        fires = torch.cat([self._fires, fired.x], 1)
        tokens, _ = side_by_side(Features(fires, torch.tensor([fires.shape[1]], device=fires.device)), self.speech.num_parts)
        return frames, reader(tokens[0, self._tokens.length :], self._pieces, self._tokens, self._said)

    @torch.inference_mode()
    def _spoken(self, read: Tensor) -> Tensor:
        """The words of all tokens, those that are not settled as ``read`` (U, C) has them."""
        return torch.cat([self._said[: self._tokens.length], self.speech.made.reader.spoken(read)])

    @torch.inference_mode()
    def _settle(self, frames: Tensor, read: Tensor, num_frames: int) -> Tensor:
        """End a read: the listener's first ``num_frames`` frames stay, and the tokens that have fired in them.

        Returns:
            The embeddings (U, D) of the other tokens.
        """
        parts, before = self.speech.num_parts, self._tokens.length
        _, _, cif, _, adapter = self.speech.made
        embeds = adapter(Features(read[None], torch.tensor([len(read)], device=read.device))).x[0]
        state, fires = self._cif, self._fires
        if (more := num_frames - self._context.length) > 0:
            fired, state = cif.stream(state, frames[None, :more])
            fires = torch.cat([fires, fired.x], 1)
        num_tokens = min(fires.shape[1] // parts, before + len(embeds))
        settled, rest = embeds[: num_tokens - before].clone(), embeds[num_tokens - before :].clone()
        # From here on nothing can fail.
        self._cif, self._fires = state, fires
        self._frames.settle(num_frames * self.speech.stride)
        self._context.settle(num_frames)
        self._pieces.settle(num_tokens * parts)
        self._tokens.settle(num_tokens)
        if len(settled):
            self.settled.append(settled)
        return rest
