"""load_llm on tiny random models: a safetensors folder and a GGUF file written here, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from x2l import llm
from x2l.llm import load_llm, probe_inputs_embeds

VOCAB, WIDTH, DEPTH, HEADS, FFN = 260, 64, 2, 4, 128


def byte_vocab() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llm")
    tiny_model().save_pretrained(path)
    vocab = {token: index for index, token in enumerate(byte_vocab())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(path)
    return path


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp stores query and key projections of Llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Llama GGUF, linear weights in Q4_1 (as SmolLM2's), and the state dict that its blocks stand for."""
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(DEPTH)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*byte_vocab(), "ab"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, DEPTH)
    state = tiny_model().state_dict()
    for key, tensor in state.items():
        if key == "lm_head.weight":
            continue
        stored = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", 2)):
            if part in key:
                stored = permuted(stored, heads)
        name = names.get_name(key, try_suffixes=(".weight",))
        if stored.ndim == 2:
            packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            rounded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
            for part, heads in (("q_proj", HEADS), ("k_proj", 2)):
                if part in key:
                    order = permuted(np.arange(len(rounded))[:, None], heads)[:, 0]
                    rounded = rounded[np.argsort(order)]
            state[key] = torch.from_numpy(np.ascontiguousarray(rounded))
        else:
            writer.add_tensor(name, stored)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, state


def test_a_safetensors_folder_is_loaded_frozen(folder: Path) -> None:
    model, tokenizer = load_llm(str(folder))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype is torch.float32
    for key, tensor in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert tokenizer.decode(tokenizer("hé 你")["input_ids"]) == "hé 你"


def test_dtype_and_attention_are_chosen_by_the_caller(folder: Path) -> None:
    model, _ = load_llm(str(folder), dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_gguf_is_dequantised_exactly_and_once(gguf_file, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = gguf_file
    model, tokenizer = load_llm(str(path))
    for key, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0, msg=key)
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)

    monkeypatch.setattr(llm, "_convert", None)  # the second start may not convert
    again, tokenizer_again = load_llm(str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer_again("hello").input_ids == tokenizer("hello").input_ids


def test_an_interrupted_conversion_starts_over(gguf_file, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = gguf_file
    convert = llm._convert

    def killed(source: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        load_llm(str(path))
    monkeypatch.setattr(llm, "_convert", convert)
    model, _ = load_llm(str(path))
    assert torch.equal(model.state_dict()["model.norm.weight"], expected["model.norm.weight"])


def test_an_unwritable_cache_is_named(gguf_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set X2L_CACHE"):
        load_llm(str(gguf_file[0]))


def test_a_digest_that_differs_is_refused(gguf_file) -> None:
    with pytest.raises(ValueError, match="expected 0000"):
        load_llm(str(gguf_file[0]), sha256="0" * 64)


def test_pickled_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load_llm(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match="neither a model folder nor a GGUF file"):
        load_llm(str(tmp_path / "model.bin"))


def test_code_in_a_model_folder_is_never_run(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    marker = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_llm(str(tmp_path))  # a known architecture: its auto_map is ignored
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot load it as a causal LM"):
        load_llm(str(tmp_path))
    assert not marker.exists()


class RefusesEmbeds(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor):
        return self.model(input_ids=input_ids)


class IgnoresEmbeds(RefusesEmbeds):
    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None):  # type: ignore[override]
        return self.model(input_ids=torch.zeros(1, 3, dtype=torch.long) if input_ids is None else input_ids)


def test_an_llm_that_cannot_read_embeddings_is_refused() -> None:
    probe_inputs_embeds(tiny_model(), "tiny")
    with pytest.raises(ValueError, match="stubborn: this LLM refuses inputs_embeds"):
        probe_inputs_embeds(RefusesEmbeds(), "stubborn")
    with pytest.raises(ValueError, match="other logits for inputs_embeds"):
        probe_inputs_embeds(IgnoresEmbeds(), "deaf")
