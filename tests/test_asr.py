"""The CIF-based ASR model: its loss, its search, its multimodal decoder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from x2l.asr import CIFASR, Decoder, Spoken, import_moonshine
from x2l.encoders.moonshine import MoonshineProcessor
from x2l.match import Matcher
from x2l.modalities.speech import Listener, interface
from x2l.modality import Modality
from x2l.recognizer import Recognizer
from x2l.types import Features, Media
from x2l.vocabulary import Vocabulary, spoken_form

VOCAB, WIDTH = 7, 16
SPELLING = torch.tensor([[1, 0, 0], [2, 0, 0], [3, 0, 0], [1, 2, 0], [2, 3, 0], [3, 1, 2], [3, 3, 0]])


def model(seed: int = 0, encoder: torch.nn.Module | None = None, parts: int = 1, **contexts: int) -> CIFASR:
    torch.manual_seed(seed)
    listener = Listener(8, WIDTH, num_blocks=1, ffn_width=16, num_heads=2, kernel=3, dropout=0.0, parts=parts, rate=0.3)
    decoder = Decoder(VOCAB, WIDTH, 16, 2, num_blocks=6, parts=parts, dropout=0.0, **contexts)
    return CIFASR(encoder or torch.nn.Identity(), listener, decoder, SPELLING)


def batch(*num_frames: int) -> Features:
    torch.manual_seed(1)
    return Features(torch.randn(len(num_frames), max(num_frames), 8), torch.tensor(num_frames))


@pytest.mark.parametrize("parts", [1, 3])
def test_learns_a_handful_of_utterances_by_heart(parts: int) -> None:
    asr, features = model(parts=parts), batch(24, 40, 31)
    tokens, lengths = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 0, 1], [2, 2, 5, 1, 0]]), torch.tensor([3, 5, 4])
    optimizer = torch.optim.AdamW(asr.parameters(), lr=5e-3)
    first = float("nan")
    for step in range(100):
        output = asr(Spoken(Media(features=features), tokens, lengths))
        first = output.loss_sum.item() if step == 0 else first
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        optimizer.step()
    assert output.num_tokens == 12
    assert output.loss_sum.item() < first / 2
    assert [t.tokens for t in asr.eval().transcribe(features)] == [[1, 2, 3], [4, 5, 6, 0, 1], [2, 2, 5, 1]]


def test_every_parameter_of_the_plain_model_learns() -> None:
    asr = model()
    torch.nn.init.normal_(asr.listener.residual.weight, std=0.1)
    output = asr(Spoken(Media(features=batch(24, 40)), torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])))
    output.loss_sum.backward()
    assert [name for name, p in asr.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_loss_does_not_depend_on_the_batch() -> None:
    asr, features = model(), batch(24, 40, 7)
    tokens, lengths = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 0], [6, 0, 0, 0]]), torch.tensor([4, 3, 1])
    together = asr(Spoken(Media(features=features), tokens, lengths)).loss_sum
    alone = torch.zeros(())
    for i, (n, u) in enumerate(zip((24, 40, 7), (4, 3, 1), strict=True)):
        one = Features(features.x[i : i + 1, :n], features.lengths[i : i + 1])
        alone = alone + asr(Spoken(Media(features=one), tokens[i : i + 1, :u], lengths[i : i + 1])).loss_sum
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("num_beams", "slack", "parts"), [(1, 0, 1), (3, 1, 1), (2, 2, 3)])
def test_transcripts_do_not_depend_on_the_batch(num_beams: int, slack: int, parts: int) -> None:
    asr, features = model(parts=parts).eval(), batch(24, 60, 2)
    together = asr.transcribe(features, num_beams, slack)
    for i, n in enumerate((24, 60, 2)):
        (alone,) = asr.transcribe(Features(features.x[i : i + 1, :n], features.lengths[i : i + 1]), num_beams, slack)
        assert alone.tokens == together[i].tokens
        assert alone.frames == pytest.approx(together[i].frames, abs=1e-3)
        assert alone.log_prob == pytest.approx(together[i].log_prob, abs=1e-3)


def test_time_stamps_are_monotone_and_inside_the_audio() -> None:
    for transcript, n in zip(model().eval().transcribe(batch(24, 61, 33)), (24, 61, 33), strict=True):
        assert transcript.frames == sorted(transcript.frames)
        assert all(0 < frame <= n for frame in transcript.frames)
        assert len(transcript.frames) == len(transcript.tokens)


def test_slack_keeps_the_most_probable_of_all_lengths() -> None:
    asr, features = model(parts=3).eval(), batch(60)
    (best,) = asr.transcribe(features, slack=2)
    counted = asr.listener.listen(features)[0].lengths
    scores = {}
    for extra in range(-2, 3):
        with torch.no_grad():
            fired, _, _ = asr.listener.listen(features, counted + extra)
            scores[int(fired.lengths)] = float(asr._search(Features(fired.x, fired.lengths), 1, None, None)[1])
    assert len(best.tokens) == max(scores, key=lambda n: scores[n])


def test_silence_gives_an_empty_transcript() -> None:
    asr = model().eval()
    torch.nn.init.constant_(asr.listener.cif.fc.bias, -20.0)
    assert [t.tokens for t in asr.transcribe(batch(24, 3), slack=1)] == [[], []]


def test_a_wide_beam_finds_the_best_of_all_sequences() -> None:
    asr, features = model(3).eval(), batch(16)
    fired, _, _ = asr.listener.listen(features)
    heard = Features(fired.x, fired.lengths)
    num_units = int(fired.lengths)
    assert 1 < num_units < 4
    candidates = torch.tensor(list(itertools.product(range(VOCAB), repeat=num_units)))
    every = Features(heard.x.expand(len(candidates), -1, -1), heard.lengths.expand(len(candidates)))
    log_probs = asr.decoder(candidates[:, :-1], every).log_softmax(-1)
    scores = log_probs.gather(2, candidates[..., None]).sum((1, 2))
    (found,) = asr.transcribe(features, num_beams=VOCAB**2)
    assert found.tokens == candidates[scores.argmax()].tolist()
    assert found.log_prob == pytest.approx(scores.max().item(), abs=1e-4)


def test_multimodal_decoder_reads_vision_then_text_and_zeros_when_absent() -> None:
    asr = model(vision_width=5, text_width=9).eval()
    assert asr.decoder.reads == ["none", "none", "vision", "vision", "text", "text"]
    heard, tokens = Features(torch.randn(2, 4, WIDTH), torch.tensor([4, 2])), torch.tensor([[1, 2, 3], [4, 0, 0]])
    absent = asr.decoder(tokens, heard)
    zeros = Features(torch.zeros(2, 3, 5), torch.tensor([3, 1]))
    torch.testing.assert_close(asr.decoder(tokens, heard, vision=zeros), absent)
    for name, width in (("vision", 5), ("text", 9)):
        x = torch.randn(2, 3, width, requires_grad=True)
        present = asr.decoder(tokens, heard, **{name: Features(x, torch.tensor([3, 1]))})
        assert not torch.allclose(present, absent)
        present.square().sum().backward()
        assert x.grad is not None
        assert (x.grad[1, 1:] == 0).all()  # beyond that context's length
        assert x.grad[0].any(-1).all()


def test_a_context_that_the_decoder_cannot_read_is_refused() -> None:
    context = Features(torch.randn(1, 3, 5), torch.tensor([3]))
    with pytest.raises(ValueError, match="vision_width=5"):
        model().transcribe(batch(24), vision=context)


def test_spoken_form() -> None:
    assert spoken_form("It's 5 o’clock -- SAID Émile,  twice.") == "it's o'clock said émile twice"


def test_an_imported_decoder_is_moonshines_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 6, "pad_token_id": 0}
    heads = {f"{part}_num_{what}": 2 for part in ("encoder", "decoder") for what in ("hidden_layers", "attention_heads")}
    torch.manual_seed(0)
    theirs = transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**sizes, **heads)).eval()
    decoder = Decoder(3, 32, 24, 2, num_blocks=2, dropout=0.0)
    pieces = [b"<unk>", b"<s>", b"</s>", b"a", "\u2581".encode(), "\u2581a".encode()]
    import_moonshine(theirs.state_dict(), pieces, ["a", " ", " a"], decoder)
    frames, tokens = torch.randn(1, 9, 32), torch.tensor([[2, 0, 1, 2]])
    # <s> and Moonshine's ids of our tokens
    hidden = theirs.model.decoder(input_ids=torch.tensor([[1, 5, 3, 4, 5]]), encoder_hidden_states=frames).last_hidden_state
    expected = theirs.proj_out(hidden)[..., [3, 4, 5]]
    torch.testing.assert_close(decoder(tokens, Features(frames, torch.tensor([9]))), expected, atol=1e-5, rtol=1e-4)
    assert decoder.embedding.weight[:3].equal(theirs.model.decoder.embed_tokens.weight[[3, 4, 5]])


def test_a_token_that_moonshine_cannot_spell_is_refused() -> None:
    state = {"model.decoder.embed_tokens.weight": torch.zeros(3, 16)}
    with pytest.raises(ValueError, match="no Moonshine token begins b'x'"):
        import_moonshine(state, [b"<unk>", b"<s>", b"a"], ["ax"], Decoder(1, 16, 16, 2, 6))


def test_recognizer_cuts_long_audio_and_keeps_time() -> None:
    class Frames(torch.nn.Module):
        """One frame of 8 samples every 100."""

        def forward(self, waves: torch.Tensor, lengths: torch.Tensor) -> Features:
            return Features(waves.unfold(1, 100, 100)[..., :8], lengths // 100)

    processor = MoonshineProcessor()
    recognizer = Recognizer(model(encoder=Frames()), processor, list("abcdefg"), 100 / 16_000, max_seconds=0.5)
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(n).astype(np.float32) for n in (30_000, 4_000, 7_999)]
    results = recognizer.transcribe(waves)
    for wave, tokens in zip(waves, results, strict=True):
        times = [time for _, time in tokens]
        assert times == sorted(times)
        assert 0 < times[0] <= times[-1] <= len(wave) / 16_000
        (alone,) = recognizer.transcribe([wave])
        assert [text for text, _ in alone] == [text for text, _ in tokens]
    assert results[0][-1][1] > 1.5


class Words:
    """A tokenizer of a few words, in the manner of Hugging Face's."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts or (" a", " cat", "s", " Dog", " it", "'s", " é", "é")

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[i] for i in row) for row in rows]

    def decode(self, row: list[int]) -> str:
        return self.batch_decode([row])[0]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = []
        while text:
            i = next(i for i, piece in enumerate(self.texts) if text.startswith(piece))
            ids.append(i)
            text = text[len(self.texts[i]) :]
        return {"input_ids": ids}


def test_vocabulary_keeps_the_llms_tokens_and_spells_them() -> None:
    vocabulary = Vocabulary.of(Words())
    assert vocabulary.token_ids == [0, 1, 2, 4, 5]
    letters = " 'acist"
    expected = ["".join(letters[i - 1] for i in row if i) for row in vocabulary.spelling.tolist()]
    assert expected == vocabulary.texts
    assert vocabulary.encode(Words(), "IT'S A Cats!") == [3, 4, 0, 1, 2]
    for wrong in ("a é", "..."):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            vocabulary.encode(Words(), wrong)


def test_han_characters_are_tokens_by_themselves() -> None:
    tokenizer = Words("你", "好", " a", "了", " go", "o", "g", " é", "é")
    vocabulary = Vocabulary.of(tokenizer, r"[\u4e00-\u9fff]|[a-z]| a")
    assert vocabulary.encode(tokenizer, "你好，A 好了") == [0, 1, 2, 1, 3]
    assert vocabulary.encode(tokenizer, "GO你") == [5, 4, 0]  # spelled
    with pytest.raises(ValueError, match="outside the vocabulary: \\['é'\\]"):
        vocabulary.encode(tokenizer, "é")


def test_matching_learns_the_llms_own_embeddings() -> None:
    torch.manual_seed(0)
    table = 0.1 * torch.randn(VOCAB, 24)
    layers = interface(8, 24, 0.1, listener={"width": WIDTH, "num_blocks": 0, "rate": 0.3}, width=WIDTH, depth=1, heads=2)
    matcher = Matcher(Modality(torch.nn.Identity(), layers), table)
    features = batch(24, 40, 31)
    counted = layers[0](features).lengths
    tokens = torch.randint(VOCAB, (3, int(counted.max()) + 2))
    told = Spoken(Media(features=features), tokens, counted + torch.tensor([0, 0, 1]))  # the last one is miscounted
    optimizer = torch.optim.AdamW([p for p in matcher.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        output = matcher(told)
        assert output.num_tokens == int(counted[:2].sum())
        optimizer.zero_grad()
        output.loss_sum.backward()
        optimizer.step()
    assert output.logs["accuracy"] == 1.0
    heard = matcher.eval().modality(told.media).x[0, 0]
    assert float(heard.norm()) == pytest.approx(float(table[tokens[0, 0]].norm()), rel=0.3)  # as long as what it stands for
