"""Stage 1: the CIF-based ASR model, a listener and an autoregressive decoder over its embeddings (X-LLM section 3.1;
Dong & Xu, arXiv 1905.11235; multimodal decoder: Han et al., arXiv 2301.13003).

Trained by cross-entropy (label smoothing 0.1), CTC over letters and the quantity loss |sum alpha - tokens|, with CIF
weights scaled to the token count; where the times of the tokens are known, the weights of each token's own frames are
also asked to add up to 1 (not in the papers). Decoding needs no end token: it runs for as many tokens as CIF fired.

Shape letters: N utterances, F frames, U tokens, K letters, V tokens of the vocabulary, C context items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.encoders.conformer import valid_frames
from x2l.encoders.fbank import SpecAugment
from x2l.interfaces.cif import CIFOutput
from x2l.modalities.reader import DecoderBlock, moonshine_blocks
from x2l.modalities.speech import Listener
from x2l.types import Features, Media, Output
from x2l.vocabulary import spelled_rows


class Spoken(NamedTuple):
    """A batch of stage 1."""

    media: Media  # the encoder's inputs, or its features (N, F, E)
    tokens: Tensor  # (N, U) right-padded transcripts, indices of the decoder's vocabulary
    token_lengths: Tensor  # (N,), each at least 1
    ends: Tensor | None = None  # (N, U) when each token was complete, as a share of the utterance, right-padded
    vision: Features | None = None  # (N, C, vision_width), a context of the multimodal decoder
    text: Features | None = None  # (N, C, text_width), the other one


@dataclass(frozen=True)
class Transcript:
    """Token ids of one utterance, when each was complete (encoder frames from the start), and its log-probability."""

    tokens: list[int]
    frames: list[float]
    log_prob: float


class Decoder(nn.Module):
    """Token u from the tokens before it, CIF embedding u, and all CIF embeddings.

    With ``vision_width`` or ``text_width`` it is the multimodal decoder: of six blocks, 3-4 attend to visual features
    and 5-6 to the linguistic context (in general the second and the last third). An absent context is one zero vector,
    which adds exactly nothing.

    Args:
        parts: of the listener: each embedding is that many vectors of ``width``, and attention sees them apart.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        ffn_width: int,
        num_heads: int,
        num_blocks: int,
        parts: int = 1,
        vision_width: int | None = None,
        text_width: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.context_widths = {"vision": vision_width, "text": text_width}
        third = num_blocks // 3
        self.reads = ["none"] * (num_blocks - 2 * third) + ["vision"] * third + ["text"] * third
        self.bos = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.parts = parts
        self.fuse = nn.Linear(parts * width, width)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, ffn_width, num_heads, self.context_widths.get(name), dropout) for name in self.reads
        )
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor, heard: Features, vision: Features | None = None, text: Features | None = None) -> Tensor:
        """Logits (N, U, V) of the tokens 0..U-1, given ``tokens`` (N, U - 1), the first ones, and CIF embeddings."""
        contexts = {"vision": self._context("vision", vision, heard), "text": self._context("text", text, heard)}
        x = self.embedding(F.pad(tokens, (1, 0), value=self.bos)) + self.fuse(heard.x[:, : tokens.shape[1] + 1])
        pieces = heard.x.unflatten(-1, (self.parts, -1)).flatten(1, 2)
        mask = valid_frames(heard.lengths * self.parts, pieces.shape[1])
        for block, name in zip(self.blocks, self.reads, strict=True):
            x = block(x, pieces, mask, contexts.get(name))
        return self.norm(x) @ self.embedding.weight[: self.bos].T

    def _context(self, name: str, context: Features | None, heard: Features) -> Features | None:
        width = self.context_widths[name]
        if width is None and context is not None:
            raise ValueError(f"this decoder has no {name} blocks: build it with {name}_width={context.x.shape[-1]}")
        if width is None or context is not None:
            return context
        zeros = heard.x.new_zeros(len(heard.x), 1, width)
        return Features(zeros, torch.ones_like(heard.lengths))


class CIFASR(nn.Module):
    """Listener, CTC head over letters, and decoder.

    Args:
        encoder: trained here too if the recipe says so; not run where a batch brings its features.
        listener: encoder frames to CIF embeddings.
        decoder: CIF embeddings to tokens.
        spelling: (V, K) letters of each token, 1-based, right-padded with 0: the CTC targets (0 is CTC's blank).
        ctc_weight, quantity_weight, guidance_weight, label_smoothing: of the loss.
        masks: stretches of the encoder's frames that training hides, as in SpecAugment, each at most ``mask_frames`` long.
        history_noise: share of the tokens that training replaces at random where the decoder reads them, so that it
            learns to go on after an error.
    """

    spelling: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        listener: Listener,
        decoder: Decoder,
        spelling: Tensor,
        ctc_weight: float = 0.3,
        quantity_weight: float = 1.0,
        guidance_weight: float = 1.0,
        label_smoothing: float = 0.1,
        masks: int = 0,
        mask_frames: int = 16,
        history_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.listener, self.decoder = encoder, listener, decoder
        self.augment = SpecAugment(0, 0, masks, mask_frames)
        self.guidance_weight, self.history_noise = guidance_weight, history_noise
        self.ctc_head = nn.Linear(listener.width // listener.parts, int(spelling.max()) + 1)
        self.register_buffer("spelling", spelling)
        self.ctc_weight, self.quantity_weight, self.label_smoothing = ctc_weight, quantity_weight, label_smoothing

    def forward(self, batch: Spoken) -> Output:
        """The stage's loss, summed over the tokens of the batch."""
        media, tokens, token_lengths, ends, vision, text = batch
        x, frame_lengths = media.features or self.encoder(**(media.inputs or {}))
        features = Features(self.augment(x, frame_lengths), frame_lengths)
        fired, hidden, lengths = self.listener.listen(features, token_lengths)
        valid = valid_frames(token_lengths, tokens.shape[1])
        logits = self.decoder(self._misread(tokens[:, :-1]), Features(fired.x, fired.lengths), vision, text)[valid]
        ce = F.cross_entropy(logits.float(), tokens[valid], label_smoothing=self.label_smoothing, reduction="sum")
        quantity = (fired.quantity - token_lengths).abs().sum()
        ctc = self._ctc(hidden, lengths, tokens, token_lengths)
        guidance = ce.new_zeros(()) if ends is None else self._guidance(fired, ends * features.lengths[:, None], valid)
        loss = ce + self.ctc_weight * ctc + self.quantity_weight * quantity + self.guidance_weight * guidance
        num_tokens = int(token_lengths.sum())
        right = (logits.argmax(-1) == tokens[valid]).sum()
        parts = {"ce": ce, "ctc": ctc, "quantity": quantity, "guidance": guidance, "accuracy": right}
        return Output(loss, num_tokens, {name: float(value.detach()) / num_tokens for name, value in parts.items()})

    def _misread(self, tokens: Tensor) -> Tensor:
        if not self.training or not self.history_noise:
            return tokens
        other = torch.randint_like(tokens, self.decoder.bos)
        return torch.where(torch.rand(tokens.shape, device=tokens.device) < self.history_noise, other, tokens)

    def _guidance(self, fired: CIFOutput, ends: Tensor, valid: Tensor) -> Tensor:
        """Sum over tokens of |the weight of a token's own frames - 1|."""
        at = (ends / self.listener.stride).clamp_max(fired.edges.shape[1] - 1)
        below = at.long().clamp_max(fired.edges.shape[1] - 2)
        weight = torch.lerp(fired.edges.gather(1, below), fired.edges.gather(1, below + 1), (at - below).double())
        return (F.pad(weight, (1, 0)).diff() - 1)[valid].abs().sum().float()

    def _ctc(self, hidden: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        """CTC over letters, each utterance's mean over its letters times its tokens: the scale of the other losses."""
        letters = [self.spelling[row[:n]] for row, n in zip(tokens, token_lengths.tolist(), strict=True)]
        letters = [rows[rows > 0] for rows in letters]
        counts = torch.tensor([len(row) for row in letters], device=hidden.device)
        log_probs = self.ctc_head(hidden).float().log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(log_probs, torch.cat(letters), lengths, counts, reduction="none", zero_infinity=True)
        return (loss / counts.clamp_min(1) * token_lengths).sum()

    @torch.inference_mode()
    def transcribe(
        self,
        features: Features,
        num_beams: int = 1,
        slack: int = 0,
        vision: Features | None = None,
        text: Features | None = None,
    ) -> list[Transcript]:
        """One token for each CIF embedding, by greedy or beam search; an utterance that fires nothing gives none.

        Args:
            slack: also try up to this many tokens more and fewer than CIF counts, the weights scaled to that number,
                and keep the most probable transcript; one miscounted token else shifts all that follow. 0 is the
                paper's.
        """
        counted, _, _ = self.listener.listen(features)
        best = self._read(counted, features, num_beams, vision, text)
        for extra in (step for size in range(1, slack + 1) for step in (-size, size)):
            lengths = (counted.lengths + extra).clamp_min(1).where(counted.lengths > 0, counted.lengths)
            other = self._read(self.listener.listen(features, lengths)[0], features, num_beams, vision, text)
            best = [max(pair, key=lambda transcript: transcript.log_prob) for pair in zip(best, other, strict=True)]
        return best

    def _read(
        self, fired: CIFOutput, features: Features, num_beams: int, vision: Features | None, text: Features | None
    ) -> list[Transcript]:
        tokens, scores = self._search(Features(fired.x, fired.lengths), num_beams, vision, text)
        frames = (fired.fire_times * self.listener.stride).minimum(features.lengths[:, None])
        return [
            Transcript(tokens[i, :count].tolist(), frames[i, :count].tolist(), float(scores[i]))
            for i, count in enumerate(fired.lengths.tolist())
        ]

    def _search(self, heard: Features, num_beams: int, vision: Features | None, text: Features | None) -> tuple[Tensor, Tensor]:
        """The best beam of each utterance: tokens (N, U) and summed log-probability (N,)."""
        num_items, num_units, _ = heard.x.shape
        contexts = [c and Features(*(y.repeat_interleave(num_beams, 0) for y in c)) for c in (heard, vision, text)]
        tokens = heard.lengths.new_zeros(num_items, num_beams, 0)
        scores = heard.x.new_full((num_items, num_beams), -torch.inf, dtype=torch.float32)
        scores[:, 0] = 0.0
        for step in range(num_units):
            logits = self.decoder(tokens.flatten(0, 1), *contexts)[:, -1].float()
            gain = logits.log_softmax(-1).unflatten(0, (num_items, num_beams))
            ended = (step >= heard.lengths)[:, None, None]
            first = torch.arange(gain.shape[-1], device=gain.device) == 0  # an ended beam goes on in one way only
            gain = gain.where(~ended, torch.where(first, 0.0, -torch.inf))
            scores, best = (scores[..., None] + gain).flatten(1).topk(num_beams)
            row, token = best // gain.shape[-1], best % gain.shape[-1]
            tokens = torch.cat([tokens.gather(1, row[..., None].expand(-1, -1, step)), token[..., None]], -1)
        return tokens[:, 0], scores[:, 0]


def import_moonshine(state: dict[str, Tensor], pieces: list[bytes], spellings: list[str], decoder: Decoder) -> None:
    """Start a decoder from Moonshine's (arXiv 2410.15608), which attends to frames where ours attends to embeddings.

    The blocks are taken as they are; ``fuse`` starts at zero, so that an untrained decoder is Moonshine's own. Each of
    our tokens starts from the mean embedding of the Moonshine tokens that spell it, longest first.

    Args:
        state: Moonshine's weights under the names of transformers.
        pieces: Moonshine's tokens by id (`x2l.encoders.moonshine.read_tokens`), U+2581 for a space.
        spellings: our tokens as text, by id.
        decoder: as wide and deep as Moonshine's, with ``len(spellings)`` tokens.

    Raises:
        ValueError: a weight is missing or has another shape, or a token that Moonshine cannot spell.
    """
    table = state["model.decoder.embed_tokens.weight"]
    renamed = {"embedding.weight": torch.cat([spelled_rows(table, pieces, spellings), table[1:2]])}
    renamed |= {name: torch.zeros_like(value) for name, value in decoder.state_dict().items() if name.startswith("fuse.")}
    renamed |= moonshine_blocks(state)
    shapes = {name: value.shape for name, value in decoder.state_dict().items() if ".context_" not in name}
    wrong = sorted(
        name
        for name in shapes.keys() | renamed.keys()
        if name not in shapes or name not in renamed or shapes[name] != renamed[name].shape
    )
    if wrong:
        raise ValueError(f"not a Moonshine decoder of this shape, see {wrong[:8]}")
    decoder.load_state_dict(renamed, strict=False)
