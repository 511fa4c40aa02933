"""When each token of a transcript was said, by the cross-attention of Moonshine's own decoder: guidance for CIF.

The decoder reads the transcript; where it looks in the frames while it writes a token is where that token was said. Dynamic
time warping makes one monotone path of it, as for the word times of Whisper (arXiv 2212.04356). Not in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from x2l.asr import Decoder, import_moonshine
from x2l.encoders.conformer import Attention
from x2l.types import Features
from x2l.vocabulary import piece_ids, spell


class Aligner:
    """Times of tokens, from encoder frames and transcripts.

    Args:
        state, pieces: Moonshine's decoder, as in `x2l.asr.import_moonshine`.
        spellings: the text of each of our tokens; each is spelled in Moonshine's.
        sizes: of Moonshine's decoder (ffn_width, num_heads, num_blocks).
    """

    def __init__(self, state: dict[str, Tensor], pieces: list[bytes], spellings: list[str], **sizes: Any) -> None:
        ids = piece_ids(pieces)
        spelled = [spell(text, ids) for text in spellings]
        used = sorted({i for row in spelled for i in row})
        index = {piece: i for i, piece in enumerate(used)}
        self.spelled = [[index[i] for i in row] for row in spelled]
        self.decoder = Decoder(len(used), state["model.decoder.norm.weight"].shape[0], **sizes).eval()
        import_moonshine(state, pieces, [pieces[i].decode().replace("\u2581", " ") for i in used], self.decoder)
        self._looks: list[Tensor] = []
        blocks: Any = self.decoder.blocks
        for block in blocks[len(blocks) // 2 :]:  # the lower half does not follow the speech closely
            block.cif_attention.register_forward_pre_hook(self._look)

    @torch.inference_mode()
    def ends(self, frames_FE: Tensor, tokens: list[int]) -> Tensor:
        """(U,) the frame at which each token was complete, increasing, the last one F.

        Raises:
            ValueError: fewer frames than Moonshine tokens: the transcript is not this speech.
        """
        rows = [self.spelled[token] for token in tokens]
        pieces = torch.tensor([[i for row in rows for i in row]])
        if len(frames_FE) < pieces.shape[1]:
            raise ValueError(f"{len(frames_FE)} frames cannot hold a transcript of {pieces.shape[1]} Moonshine tokens")
        self._looks.clear()
        self.decoder(pieces[:, :-1], Features(frames_FE.float()[None], torch.tensor([len(frames_FE)])))
        looks_HPF = torch.cat(self._looks)
        spread = looks_HPF.std(1, correction=0, keepdim=True).clamp_min(1e-6)
        weight_PF = ((looks_HPF - looks_HPF.mean(1, keepdim=True)) / spread).mean(0)
        piece_ends = torch.from_numpy(monotone_ends(weight_PF.numpy()))
        last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        return piece_ends[last]

    def _look(self, attention: Attention, inputs: tuple[Tensor, ...]) -> None:
        """Record the weights (H, P, F) that cross-attention is about to use."""
        x, heard = inputs[0][0], inputs[1][0]
        q, k = (y.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for y in (attention.q_proj(x), attention.k_proj(heard)))
        self._looks.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1))


def monotone_ends(weight_PF: NDArray[np.float32]) -> NDArray[np.int64]:
    """Give each of F frames to one of P <= F pieces, in order and at least one each, for the largest sum of weights.

    Returns:
        (P,) one past the last frame of each piece.
    """
    num_pieces, num_frames = weight_PF.shape
    best = np.full(num_pieces, -np.inf)
    best[0] = weight_PF[0, 0]
    entered = np.zeros((num_frames, num_pieces), bool)  # the path enters piece p at frame f
    for frame in range(1, num_frames):
        before = np.concatenate([[-np.inf], best[:-1]])
        entered[frame] = before > best
        best = np.maximum(before, best) + weight_PF[:, frame]
    ends = np.empty(num_pieces, np.int64)
    piece = num_pieces - 1
    ends[piece] = num_frames
    for frame in range(num_frames - 1, 0, -1):
        if piece and entered[frame, piece]:
            piece -= 1
            ends[piece] = frame
    return ends
