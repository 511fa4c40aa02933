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
from torch import Tensor

from x2l.encoders.moonshine import HOP, RATE
from x2l.modalities.growing import GrowingEncoder, GrowingListener, GrowingReader
from x2l.modalities.reader import Reader
from x2l.modalities.speech import side_by_side
from x2l.modality import Modality
from x2l.past import Past
from x2l.types import Features

STEP = RATE // 2  # samples after which something is settled


def can_settle(modality: Modality) -> bool:
    """Whether a speech modality's parts can go on after what is settled: Moonshine's encoder in torch, a `Reader` that reads again
    with the words that it understood, soft words."""
    again = any(isinstance(part, Reader) and part.again > 0 for part in modality.interface)
    return again and hasattr(type(modality.encoder), "in_torch")  # the encoder's own would be built to look


class Parts(NamedTuple):
    """A recording to frames, frames to what CIF integrates, what has fired to what the adapter reads."""

    encoder: GrowingEncoder
    listener: GrowingListener
    reader: GrowingReader


class GrowingSpeech:
    """A speech modality that `can_settle`, for recordings that grow, with the weights that it has when it first hears something;
    CIF and adapter are its own."""

    def __init__(self, modality: Modality) -> None:
        encoder: Any = modality.encoder
        interface: Any = modality.interface
        self._encoder, (self._listener, self._reader, self.adapter) = encoder, interface
        self.cif, self.stride, self.parts = self._listener.cif, self._listener.stride, self._listener.parts
        self.max_frames = int(encoder.max_seconds * RATE / HOP)  # that the encoder sees at once
        self._making, self._made = threading.Lock(), list[Parts]()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.adapter.linear.weight.device
        return device

    @property
    def made(self) -> Parts:
        """Its parts; made from copies, since the modules may be moved or trained."""
        with self._making:
            if not self._made:
                network, listener = copy.deepcopy(self._encoder.in_torch).to(self.device), copy.deepcopy(self._listener)
                reader = copy.deepcopy(self._reader, {id(self._reader.words): self._reader.words})
                self._made.append(Parts(GrowingEncoder(network), GrowingListener(listener), GrowingReader(reader)))
            return self._made[0]

    @torch.inference_mode()
    def open(self, lookahead: float) -> None:
        """Make what is made when something is heard; oneDNN compiles the products for reads with so much ``lookahead`` or less."""
        encoder, listener, reader = self.made
        for num_frames in range(8, (round(lookahead * RATE) + STEP) // HOP + 8, 8):
            listener(encoder(torch.zeros(num_frames * HOP), Past()), Past())
        for num_tokens in range(1, 18, 4):
            heard = torch.zeros(num_tokens, self.parts * self.cif.width, device=self.device)
            read = reader(heard, Past(), Past(), heard[:0, : self.cif.width])
            self.adapter(Features(read[None], torch.tensor([num_tokens], device=self.device)))


class Hearing:
    """What a speech modality makes of one recording (S,) that grows: of its samples, however they come in.

    A call that fails leaves all as it was before.

    Args:
        speech: reads it.
        lookahead: seconds of sound after a frame before it is settled.
    """

    def __init__(self, speech: GrowingSpeech, lookahead: float) -> None:
        self.speech, self.lookahead = speech, round(lookahead * RATE)  # in samples
        self.samples = 0  # of which something was settled for the last time
        self.settled: list[Tensor] = []  # embeddings (U, D), by the steps that settled any
        # What the last step did not settle, and the words of all tokens as it read them.
        self._rest = torch.zeros(0, speech.adapter.linear.out_features, device=speech.device)
        self._said = torch.zeros(0, speech.cif.width, device=speech.device)
        # Frames of the encoder and of the listener, CIF and what has fired, pieces and tokens of the reader.
        self._frames, self._context, self._pieces, self._tokens = Past(limit=speech.max_frames), Past(), Past(), Past()
        self._cif: Any = None
        self._fires = torch.zeros(1, 0, speech.cif.width, device=speech.device)

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
        speech, (encoder, listener, reader) = self.speech, self.speech.made
        frames = listener(encoder(wave, self._frames), self._context)
        fired, _ = speech.cif.stream(self._cif, frames[None], last=True)
        fires = torch.cat([self._fires, fired.x], 1)
        tokens, _ = side_by_side(Features(fires, torch.tensor([fires.shape[1]], device=speech.device)), speech.parts)
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
        speech, before = self.speech, self._tokens.length
        embeds = speech.adapter(Features(read[None], torch.tensor([len(read)], device=speech.device))).x[0]
        state, fires = self._cif, self._fires
        if (more := num_frames - self._context.length) > 0:
            fired, state = speech.cif.stream(state, frames[None, :more])
            fires = torch.cat([fires, fired.x], 1)
        num_tokens = min(fires.shape[1] // speech.parts, before + len(embeds))
        settled, rest = embeds[: num_tokens - before].clone(), embeds[num_tokens - before :].clone()
        # From here on nothing can fail.
        self._cif, self._fires = state, fires
        self._frames.settle(num_frames * speech.stride)
        self._context.settle(num_frames)
        self._pieces.settle(num_tokens * speech.parts)
        self._tokens.settle(num_tokens)
        if len(settled):
            self.settled.append(settled)
        return rest
