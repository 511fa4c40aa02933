"""Continuous integrate-and-fire (Dong & Xu, arXiv 1905.11235; X-LLM, arXiv 2305.04160, section 3.1).

One embedding a token, from frames h_t with weights alpha_t >= 0. Lay the frames side by side on a line, each as long as
its weight: frame t covers [c_{t-1}, c_t] with c = cumsum(alpha). Embedding j owns [j, j + 1], so that

    E_j = sum_t W[j, t] h_t        W[j, t] = |[c_{t-1}, c_t] and [j, j + 1] in common|

for every alpha, above 1 too. Walking along the line, each step enters either the next frame or the next embedding, so
one list of at most F + U overlaps holds all of W. Cut by embedding, the list gives the forward sum; cut by frame, the
gradient of h. Both are one weighted ``embedding_bag``.

Shape letters: N utterances, F frames, C channels, U embeddings of the utterance that has most, P overlaps in all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.types import Features


class CIFOutput(NamedTuple):
    """What fired, right-padded with zeros."""

    x: Tensor  # (N, U, C), the dtype of the frames
    lengths: Tensor  # (N,) int64, embeddings of each utterance
    fire_times: Tensor  # (N, U) float64, when each embedding was complete, in frames since the start of the utterance
    quantity: Tensor  # (N,) float32, sum of the unscaled alpha, for the quantity loss |quantity - number of tokens|
    edges: Tensor  # (N, F + 1) float64, the sum of the unscaled alpha before each frame


class CIFState(NamedTuple):
    """What a stream carries from one chunk to the next. All N streams of a batch advance together."""

    mean_NC: Tensor  # weighted mean of the frames since the last fire
    total_N: Tensor  # float64, weight since the start
    num_frames: int  # frames integrated since the start
    context_NFC: Tensor  # the last frames that the convolution of `CIF` has yet to see in full


def cif(
    x_NFC: Tensor,
    alpha_NF: Tensor,
    lengths_N: Tensor,
    target_lengths_N: Tensor | None = None,
    tail_threshold: float = 0.5,
) -> CIFOutput:
    """Integrate the frames of each utterance; an embedding fires each time the weights have added up to 1.

    Each utterance is treated by its own length: frames beyond it are never read, whatever they hold. The weight left
    after the last fire makes one more embedding, divided by that weight, if it exceeds ``tail_threshold``; else it is
    dropped. Silence (weights that never reach the threshold) and zero frames give zero embeddings.

    Args:
        x_NFC: frames, any float dtype.
        alpha_NF: weights, finite and >= 0 within the lengths; accumulated in float64.
        lengths_N: valid frames of each utterance, int64.
        target_lengths_N: scale the alpha of each utterance so that exactly this many embeddings fire, with no tail
            (for training the ASR model, 1905.11235 section 3.2).
        tail_threshold: the residual weight above which the tail makes an embedding.

    Raises:
        ValueError: shapes that do not fit, a length beyond F, a weight that is negative or not finite, or a target
            length for an utterance whose weights are all zero.
    """
    num_items, num_frames, _ = x_NFC.shape
    if alpha_NF.shape != (num_items, num_frames) or lengths_N.shape != (num_items,):
        raise ValueError(
            f"frames {tuple(x_NFC.shape)} need weights {(num_items, num_frames)} and lengths {(num_items,)}, "
            f"got {tuple(alpha_NF.shape)} and {tuple(lengths_N.shape)}"
        )
    if num_items and lengths_N.max() > num_frames:
        raise ValueError(f"an utterance is said to have {int(lengths_N.max())} frames in a batch of {num_frames}")
    alpha_NF = alpha_NF.double().masked_fill(_beyond(lengths_N, num_frames), 0.0)
    edges = _accumulate(alpha_NF, alpha_NF.new_zeros(num_items))
    scaled = edges if target_lengths_N is None else _scale(edges, target_lengths_N)
    x_NUC, counts_N, times_NU = _integrate(x_NFC, scaled, lengths_N, tail_threshold)
    return CIFOutput(x_NUC, counts_N, times_NU, edges[:, -1].float(), edges)


@torch.no_grad()
def stream(
    state: CIFState, x_NFC: Tensor, alpha_NF: Tensor, last: bool = False, tail_threshold: float = 0.5
) -> tuple[CIFOutput, CIFState]:
    """Integrate the next chunk of N utterances: what fires here, and the state for the next chunk.

    The embeddings of all chunks together are those of `cif` on the whole, however it is cut. ``last`` ends the
    utterances: the tail comes out too. A chunk may be empty. ``quantity`` is the weight of this chunk.
    """
    num_items, num_frames, _ = x_NFC.shape
    # The frames since the last fire enter as one frame: their mean, as wide as their weight.
    x = torch.cat([state.mean_NC[:, None], x_NFC], dim=1)
    total = _accumulate(alpha_NF.double(), state.total_N)
    edges = F.pad(total - total[:, :1].floor(), (1, 0))
    lengths_N = torch.full((num_items,), 1 + num_frames, device=x.device)
    fired, counts_N, times = _integrate(x, edges, lengths_N, tail_threshold if last else 0.0)
    times = (times + (state.num_frames - 1)).masked_fill(_beyond(counts_N, times.shape[1]), 0.0)
    mean_NC = torch.zeros_like(state.mean_NC)
    if not last:
        fires_N = edges[:, -1].long()
        unfinished = counts_N > fires_N  # their last embedding is the mean so far, not a fire
        mean_NC[unfinished] = fired[unfinished, fires_N[unfinished]]
        counts_N = fires_N
        width = int(counts_N.max()) if num_items else 0
        beyond = _beyond(counts_N, width)
        fired = fired[:, :width].masked_fill(beyond[..., None], 0.0)
        times = times[:, :width].masked_fill(beyond, 0.0)
    state = state._replace(mean_NC=mean_NC, total_N=total[:, -1], num_frames=state.num_frames + num_frames)
    return CIFOutput(fired, counts_N, times, (total[:, -1] - total[:, 0]).float(), total - total[:, :1]), state


def start(x_NFC: Tensor) -> CIFState:
    """The state before the first chunk, for frames of this shape (F is not used), dtype and device."""
    num_items, _, width = x_NFC.shape
    zeros = x_NFC.new_zeros(num_items, width)
    return CIFState(zeros, zeros.new_zeros(num_items, dtype=torch.float64), 0, x_NFC.new_zeros(num_items, 0, width))


class CIF(nn.Module):
    """The weight predictor (1-D convolution, dropout, linear, sigmoid) and the integration.

    The frame embeddings of an utterance depend on nothing else in the batch. Streaming needs ``kernel // 2`` frames of
    look-ahead.
    """

    def __init__(self, width: int, kernel: int = 5, dropout: float = 0.0, tail_threshold: float = 0.5) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"the CIF convolution needs an odd kernel to be centred, got {kernel}")
        self.width = width
        self.reach = kernel // 2
        self.tail_threshold = tail_threshold
        self.conv = nn.Conv1d(width, width, kernel)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, 1)

    def forward(self, features: Features, target_lengths: Tensor | None = None) -> CIFOutput:
        """Frames (N, F, C) to embeddings (N, U, C); ``target_lengths`` as in `cif`, for training alone."""
        x_NFC, lengths_N = features
        beyond_NF = _beyond(lengths_N, x_NFC.shape[1])
        padded = F.pad(x_NFC.masked_fill(beyond_NF[..., None], 0.0), (0, 0, self.reach, self.reach))
        return cif(x_NFC, self._weights(padded), lengths_N, target_lengths, self.tail_threshold)

    @torch.no_grad()
    def stream(self, state: CIFState | None, x_NFC: Tensor, last: bool = False) -> tuple[CIFOutput, CIFState]:
        """The next chunk of N utterances (None begins them), as in the function `stream`.

        Embeddings come ``kernel // 2`` frames late, since the convolution looks that far ahead.
        """
        if state is None:
            state = start(x_NFC)
            state = state._replace(context_NFC=F.pad(state.context_NFC, (0, 0, self.reach, 0)))
        seen = torch.cat([state.context_NFC, F.pad(x_NFC, (0, 0, 0, self.reach if last else 0))], dim=1)
        num_ready = max(0, seen.shape[1] - 2 * self.reach)
        ready = seen[:, self.reach : self.reach + num_ready]
        output, state = stream(state, ready, self._weights(seen), last, self.tail_threshold)
        return output, state._replace(context_NFC=seen[:, num_ready:])

    def _weights(self, padded: Tensor) -> Tensor:
        """Weights (N, F), float64 from the sigmoid on, of frames that have ``reach`` neighbours on both sides."""
        if padded.shape[1] <= 2 * self.reach:
            return padded.new_zeros(len(padded), 0, dtype=torch.float64)
        hidden = self.conv(padded.transpose(1, 2)).transpose(1, 2)
        return self.fc(self.dropout(hidden)).squeeze(-1).double().sigmoid()


def _beyond(lengths_N: Tensor, num: int) -> Tensor:
    return torch.arange(num, device=lengths_N.device) >= lengths_N[:, None]


def _accumulate(alpha_NF: Tensor, total_N: Tensor) -> Tensor:
    """The F + 1 edges of the frames on the line, from where the line stands."""
    if alpha_NF.numel():
        low, high = (float(bound) for bound in alpha_NF.detach().aminmax())
        if not (low >= 0 and high < math.inf):
            raise ValueError(f"CIF weights must be finite and >= 0, got values from {low} to {high}")
    return torch.cat([total_N[:, None], alpha_NF], dim=1).cumsum(1)


def _scale(edges: Tensor, target_lengths_N: Tensor) -> Tensor:
    total_N = edges[:, -1]
    silent = (total_N == 0) & (target_lengths_N > 0)
    if silent.any():
        rows = silent.nonzero().flatten().tolist()
        raise ValueError(f"utterances {rows} have a target length but no CIF weight to scale")
    # Divide first: total / total is exactly 1, so the last edge is the target itself and floor() loses no fire.
    return edges / torch.where(total_N > 0, total_N, 1.0)[:, None] * target_lengths_N[:, None]


def _integrate(x_NFC: Tensor, edges: Tensor, lengths_N: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, U, C), how many (N,), and fire times (N, U), from the edges (N, F + 1) of the frames."""
    total_N = edges[:, -1]
    fires_N = total_N.detach().long()
    counts_N = fires_N + (total_N.detach() - fires_N > threshold)
    num_items, _, width = x_NFC.shape
    num_units = int(counts_N.max()) if num_items else 0
    if num_units == 0:
        return x_NFC[:, :0], counts_N, edges.detach()[:, :0]

    unit_U = torch.arange(num_units, device=edges.device)
    with torch.no_grad():
        # The frame in which embedding j completes; num_frames where none does.
        fired_NU = torch.searchsorted(edges, (unit_U + 1).double().expand(num_items, -1).contiguous()) - 1
        floor = edges.long()
        frame_offsets, unit_offsets = _staircase(fired_NU, floor, counts_N, lengths_N + fires_N)
        frame_P = torch.repeat_interleave(frame_offsets.diff())
        bag_P = torch.repeat_interleave(unit_offsets.diff())
        unit_P = bag_P % num_units
        first_P = unit_P == floor[:, :-1].flatten()[frame_P]  # the overlap begins where its frame begins
        last_P = unit_P == floor[:, 1:].flatten()[frame_P]  # and ends where its frame ends
        times_NU = _fire_times(fired_NU, edges, unit_U)
        times_NU = torch.where(unit_U < fires_N[:, None], times_NU, lengths_N[:, None])
        times_NU = times_NU.masked_fill(unit_U >= counts_N[:, None], 0.0)

    begin_P = torch.where(first_P, edges[:, :-1].flatten()[frame_P], unit_P)
    end_P = torch.where(last_P, edges[:, 1:].flatten()[frame_P], unit_P + 1)
    weight_NU = torch.where(unit_U < fires_N[:, None], 1.0, total_N[:, None] - unit_U)  # 1, and less for a tail
    overlap_P = ((end_P - begin_P) / weight_NU.flatten()[bag_P]).to(x_NFC.dtype)
    x = x_NFC.reshape(-1, width)
    fired = _weighted_sum(x.detach(), frame_P, unit_offsets, overlap_P)
    fired = _FrameGradient.apply(fired, x, overlap_P, bag_P, frame_offsets)
    return fired.view(num_items, num_units, width), counts_N, times_NU


def _staircase(fired_NU: Tensor, floor: Tensor, counts_N: Tensor, ends_N: Tensor) -> tuple[Tensor, Tensor]:
    """Where each frame (N * F + 1) and each embedding (N * U + 1) begins in the list of overlaps.

    Within an utterance, frame t meets embedding j at position t + j, and ``ends_N`` positions are all there are. What
    lies beyond the embeddings that are emitted is left out.
    """
    unit = torch.arange(1, fired_NU.shape[1] + 1, device=floor.device)
    frame = torch.arange(floor.shape[1] - 1, device=floor.device)
    unit_starts = F.pad(fired_NU + unit, (1, 0)).minimum(ends_N[:, None])
    kept_N1 = unit_starts.gather(1, counts_N[:, None])
    row_N1 = kept_N1.cumsum(0) - kept_N1
    end = kept_N1.sum()[None]
    frames = (frame + floor[:, :-1]).minimum(kept_N1) + row_N1
    units = unit_starts[:, :-1].minimum(kept_N1) + row_N1
    return torch.cat([frames.flatten(), end]), torch.cat([units.flatten(), end])


def _fire_times(fired_NU: Tensor, edges: Tensor, unit_U: Tensor) -> Tensor:
    """When the line reaches j + 1, in frames: weight is taken to flow evenly within a frame."""
    frame_NU = fired_NU.clamp(max=edges.shape[1] - 2)
    begin_NU, end_NU = edges.gather(1, frame_NU), edges.gather(1, frame_NU + 1)
    return frame_NU + (unit_U + 1 - begin_NU) / (end_NU - begin_NU)


class _FrameGradient(torch.autograd.Function):
    """Adds the gradient of the frames to a sum that autograd differentiates by its weights.

    The overlaps are sorted by embedding and by frame alike: the gradient of the frames is the same sum read the other
    way, where autograd's own, which cannot know that, sorts the list and scatters into zeros.
    """

    @staticmethod
    def forward(ctx: Any, fired: Tensor, x: Tensor, overlap_P: Tensor, bag_P: Tensor, frame_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(overlap_P, bag_P, frame_offsets)
        return fired.view_as(fired)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        overlap_P, bag_P, frame_offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _weighted_sum(grad, bag_P, frame_offsets, overlap_P) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, None, None


def _weighted_sum(rows: Tensor, index_P: Tensor, offsets: Tensor, weight_P: Tensor) -> Tensor:
    return F.embedding_bag(index_P, rows, offsets, mode="sum", per_sample_weights=weight_P, include_last_offset=True)
