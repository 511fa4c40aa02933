"""What if the S-Adapter wrote in the LLM's own words? Speech into a frozen LLM after stage 1 alone, nothing else trained.

The C-Former is stage 1's decoder, asked for all tokens at once (x2l/modalities/reader.py). Its posterior over tokens, sharpened
by a temperature, weighs the rows of the LLM's table: the LLM reads words, doubtful ones as mixtures.

    python benchmarks/soft_words.py HELD_OUT.tar SPEECH.tar [--temperature 0.1] [--num 100]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from x2l.assistant import Assistant
from x2l.build import Built, build
from x2l.config import TrainConfig
from x2l.data.sources import read_source
from x2l.eval import asr as recognisers
from x2l.eval import questions, spoken
from x2l.modalities.reader import Reader, import_decoder
from x2l.modality import Modality
from x2l.recognizer import Vocabulary
from x2l.types import Features
from x2l.weights import resolve


class Ears(nn.Module):
    """The listener of stage 1: frames to one embedding a spoken token."""

    def __init__(self, listener: Any) -> None:
        super().__init__()
        self.listener = listener

    def forward(self, features: Features) -> Features:
        """(N, F, E) -> (N, U, parts * C)."""
        fired, _, _ = self.listener.listen(features)
        return Features(fired.x, fired.lengths)


class SoftWords(nn.Module):
    """(N, U, C) -> (N, U, D): the mean of the LLM's embeddings under the posterior of each token.

    Args:
        spoken_VC: output embeddings of stage 1's decoder. words_VD: the LLM's rows of the same tokens.
    """

    def __init__(self, spoken_VC: Tensor, words_VD: Tensor, temperature: float) -> None:
        super().__init__()
        self.register_buffer("spoken", spoken_VC)
        self.register_buffer("words", words_VD)
        self.temperature = temperature

    def forward(self, features: Features) -> Features:
        """Lengths stay."""
        posterior = (features.x @ self.spoken.T / self.temperature).softmax(-1)
        return Features(posterior @ self.words, features.lengths)


def assistant(temperature: float) -> Assistant:
    """The LLM of the shipped stage 1, hearing through it."""
    run = resolve("x2l:tiny/asr")
    recognizer, _, _ = recognisers.cif_asr(Path("x2l:tiny/asr"))
    config = TrainConfig.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
    stage1, listener = recognizer.asr, recognizer.asr.listener
    reader = Reader(listener.width, listener.parts, **config.stage_args["decoder"])
    import_decoder(stage1.decoder.state_dict(), reader)
    built: Built = build(config.model, ["speech"])
    vocabulary = Vocabulary.of(built.renderer.tokenizer, config.stage_args["vocabulary"])
    words = built.model.llm.get_input_embeddings().weight[vocabulary.token_ids].detach().float()
    soft = SoftWords(stage1.decoder.embedding.weight[: stage1.decoder.bos].detach(), words, temperature)
    built.model.modalities["speech"] = Modality(stage1.encoder, [Ears(listener), reader, soft])
    return Assistant(built)


def main() -> None:
    """Agreement on spoken questions, and the error rate of writing down real speech."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", help="spoken questions (x2l data questions)")
    parser.add_argument("speech", help="speech and its text")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--num", type=int, default=100, help="recordings to write down, drawn by seed")
    parser.add_argument("--out", type=Path, default=Path("runs/soft_words"))
    args = parser.parse_args()
    model = assistant(args.temperature)
    info = model.info() | {"temperature": args.temperature}
    rows = read_source(args.held_out)
    runs = spoken.compare(model, rows, args.out / "spoken", dataset=args.held_out, model_info=info, render=model.render)
    print(spoken.table(runs))
    asked = questions.draw(questions.asr(read_source(args.speech), cluster="spk"), args.num, 0)
    systems = {"soft words: LLM": recognisers.System(model, info, {"max_new_tokens": 32}, model.render)}
    peers, _ = recognisers.systems(None, Path("x2l:tiny/asr"), ["moonshine"], asked, {"num_beams": 4, "slack": 0})
    print(recognisers.table(recognisers.run(systems | peers, asked, args.out / "asr", args.speech, 0, 16), "moonshine"))


if __name__ == "__main__":
    main()
