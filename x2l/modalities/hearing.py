"""A recording that is read while it is made: what was heard a while ago is settled, and only what came since is read again.

Encoder, listener and C-Former attend to a whole recording, so that each new sound may change all of its embeddings; but sound
that comes long after a frame changes little in it. Every `STEP` the frames with ``lookahead`` seconds of sound
behind them are settled, and with them the tokens that CIF has fired there: layers keep their keys and values (`x2l.past.Past`),
CIF its state (`CIF.stream`), and the LLM may take the embeddings in. What is left to read at the end are ``lookahead`` seconds,
or a `STEP` more, but for the encoder's first convolution, whose norm is over all. Not in the paper, where CIF could stream but
what surrounds it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x2l.encoders.moonshine import RATE
from x2l.modalities.reader import Reader
from x2l.modalities.speech import side_by_side
from x2l.modality import Modality
from x2l.past import Past
from x2l.types import Features

STEP = RATE // 2  # samples after which something is settled


def can_settle(modality: Modality) -> bool:
    """Whether a speech modality's parts can go on after what is settled: Moonshine's encoder in torch, a `Reader`, soft words."""
    return hasattr(modality.encoder, "resume") and any(isinstance(part, Reader) for part in modality.interface)


class Hearing:
    """What a speech modality makes of one recording (S,) that grows: of its samples, however they come in.

    A call that fails leaves all as it was before.

    Args:
        modality: one that `can_settle`.
        lookahead: seconds of sound after a frame before it is settled.
    """

    def __init__(self, modality: Modality, lookahead: float) -> None:
        encoder: Any = modality.encoder
        interface: Any = modality.interface
        self._encoder, (self._listener, self._reader, self._adapter) = encoder, interface
        self._device = next(modality.interface.parameters()).device
        self.lookahead = round(lookahead * RATE)  # samples
        self.samples = 0  # of which something was settled for the last time
        self.settled: list[Tensor] = []  # embeddings (U, D), by the steps that settled any
        self._rest = torch.zeros(0, self._adapter.linear.out_features, device=self._device)  # what the last step did not settle
        self._hop = round(encoder.seconds_per_frame * RATE) * self._listener.stride  # samples a frame of the listener
        # Frames of the encoder and of the listener, CIF and what has fired, pieces and tokens of the reader.
        self._frames = Past(limit=int(encoder.max_seconds / encoder.seconds_per_frame))
        self._context, self._pasts = Past(), self._reader.pasts()
        self._cif: Any = None
        self._fires = torch.zeros(1, 0, self._listener.cif.width, device=self._device)

    def step(self, wave: Tensor) -> None:
        """Settle what can be after the next `STEP`.

        Raises:
            ValueError: the recording is shorter than that.
        """
        samples = self.samples + STEP
        if len(wave) < samples:
            raise ValueError(f"a recording of {len(wave)} samples, to be settled after {samples}")
        frames, embeds = self._read(wave[:samples])
        self._rest = self._settle(frames, embeds, max(0, samples - self.lookahead) // self._hop)
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
        frames, embeds = self._read(wave)
        return list(self.settled), self._settle(frames, embeds, self._context.length)

    @torch.inference_mode()
    def _read(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after the settled places: the frames (1, F, C) that CIF integrates, and embeddings (U, D)."""
        for past in (self._frames, self._context, *self._pasts):
            past.begin()
        encoded = self._encoder.resume(wave.to(self._device), self._frames)
        lengths = torch.tensor([encoded.shape[1]], device=self._device)
        _, frames, _ = self._listener.frames(Features(encoded, lengths), self._context)
        fired, _ = self._listener.cif.stream(self._cif, frames, last=True)
        fires = torch.cat([self._fires, fired.x], 1)
        tokens, _ = side_by_side(Features(fires, lengths.new_tensor([fires.shape[1]])), self._listener.parts)
        new = tokens[:, self._pasts[1].length :]
        heard = self._reader(Features(new, lengths.new_tensor([new.shape[1]])), self._pasts)
        return frames, self._adapter(heard).x[0]

    @torch.inference_mode()
    def _settle(self, frames: Tensor, embeds: Tensor, num_frames: int) -> Tensor:
        """End a read: the listener's first ``num_frames`` frames stay, and the tokens that have fired in them. Gives the rest."""
        parts, before = self._listener.parts, self._pasts[1].length
        if (more := num_frames - self._context.length) > 0:
            fired, self._cif = self._listener.cif.stream(self._cif, frames[:, :more])
            self._fires = torch.cat([self._fires, fired.x], 1)
        self._frames.settle(num_frames * self._listener.stride)
        self._context.settle(num_frames)
        num_tokens = min(self._fires.shape[1] // parts, before + len(embeds))
        pieces, *tokens = self._pasts
        pieces.settle(num_tokens * parts)
        for past in tokens:
            past.settle(num_tokens)
        if num_tokens > before:
            self.settled.append(embeds[: num_tokens - before].clone())
        return embeds[num_tokens - before :].clone()
