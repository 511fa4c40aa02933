"""Translation models: transformers' (mBART-50 of random weights) and CTranslate2's, as a folder and as an Argos archive."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from x2l.data.sources import DataError
from x2l.data.transforms.hf import Seq2SeqTranslator
from x2l.data.transforms.translators import CTranslate2Translator

sentencepiece = pytest.importorskip("sentencepiece")
ctranslate2 = pytest.importorskip("ctranslate2")
TEXTS = ["A dog runs. Two men sit!", "Snow."]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 60 pieces."""
    prefix = tmp_path_factory.mktemp("pieces") / "sentencepiece"
    lines = [f"A {a} {b}." for a in ("dog", "cat", "man", "bird") for b in ("runs", "sits", "jumps", "sleeps in the snow")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 4), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return prefix.with_suffix(".model")


def network(vocab: int) -> torch.nn.Module:
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=vocab, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=512, init_std=0.5,
        normalize_before=True, normalize_embedding=True, add_final_layer_norm=True,  # CTranslate2's converter asks for them
    )  # fmt: skip
    return MBartForConditionalGeneration(config)


@pytest.fixture(scope="module")
def mbart(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MBart50Tokenizer

    folder = tmp_path_factory.mktemp("mbart")
    tokenizer = MBart50Tokenizer.from_pretrained(str(pieces.parent), vocab_file=str(pieces), src_lang="en_XX", tgt_lang="zh_CN")
    tokenizer.save_pretrained(folder)
    network(len(tokenizer)).save_pretrained(folder)
    return folder


def test_a_model_of_transformers(mbart: Path) -> None:
    translator = Seq2SeqTranslator(str(mbart), max_new_tokens=8)
    together, counts = translator.translate(TEXTS, "en", "zh")
    assert together == [translator.translate([text], "en", "zh")[0][0] for text in TEXTS]
    assert counts["tokens"] > 0
    model, tokenizer = translator._model
    asked: list[dict[str, object]] = []
    generate = model.generate
    model.generate = lambda **options: (asked.append(options), generate(**options))[1]
    translator.translate(TEXTS[:1], "zh", "en")
    assert asked[0]["forced_bos_token_id"] == tokenizer.convert_tokens_to_ids("en_XX")
    assert asked[0]["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("zh_CN")  # type: ignore[index]
    assert pickle.loads(pickle.dumps(translator)).translate(TEXTS, "en", "zh")[0] == together
    with pytest.raises(DataError, match="does not know the language 'xx'"):
        translator.translate(TEXTS, "xx", "zh")
    with pytest.raises(DataError, match="transformers cannot load it"):
        Seq2SeqTranslator(str(mbart.parent)).translate(TEXTS, "en", "zh")


@pytest.fixture(scope="module")
def opus(pieces: Path, mbart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opus")
    ctranslate2.converters.TransformersConverter(str(mbart)).convert(str(folder / "model"))
    (folder / "sentencepiece.model").write_bytes(pieces.read_bytes())
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"bos_token": "<s>", "decoder_start_token": "</s>"}  # the converter finds none in mBART-50's tokenizer
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_ctranslate2(opus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    translator = CTranslate2Translator(str(opus), beams=1)
    found, counts = translator.translate(TEXTS, "en", "zh")
    halves = [translator.translate([half], "en", "zh")[0][0] for half in ("A dog runs.", "Two men sit!")]
    assert found[0] == "".join(halves), "sentence by sentence"
    assert len(found) == 2
    assert counts["pieces"] > 6
    archive = tmp_path / "zh_en.argosmodel"
    with zipfile.ZipFile(archive, "w") as bag:
        for path in [opus / "sentencepiece.model", *(opus / "model").iterdir()]:
            bag.write(path, f"zh_en/{path.relative_to(opus)}")
        bag.writestr("zh_en/../../outside.bin", b"no")
        bag.writestr("/outside.bin", b"no")
    packed = CTranslate2Translator(str(archive), beams=1)
    assert packed.translate(TEXTS, "en", "zh")[0] == found
    assert pickle.loads(pickle.dumps(packed)).translate(TEXTS, "en", "zh")[0] == found
    assert not list(tmp_path.rglob("outside.bin"))
    (tmp_path / "broken.argosmodel").write_bytes(b"no zip")
    with pytest.raises(DataError, match="neither a folder nor a zip archive"):
        CTranslate2Translator(str(tmp_path / "broken.argosmodel")).translate(TEXTS, "en", "zh")
    with pytest.raises(DataError, match=r"must hold sentencepiece\.model"):
        CTranslate2Translator(str(opus / "model")).translate(TEXTS, "en", "zh")
