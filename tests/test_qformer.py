"""Q-Former: BLIP-2 weights give BLIP-2's outputs, padding changes nothing, gradients reach everything."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import Tensor

from x2l.encoders.hf import VisionEncoder
from x2l.interfaces.qformer import QFormer, import_blip2
from x2l.types import Features

Q, E, SMALL = 4, 24, {"width": 32, "depth": 3, "heads": 4, "num_queries": 4}


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Biases, norms and queries away from 0 and 1, so that a swapped tensor shows."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        base = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, base, 0.05)
    return module.eval()


def features(num_items: int = 2, num_frames: int = 7, width: int = E) -> Features:
    torch.manual_seed(1)
    return Features(torch.randn(num_items, num_frames, width), torch.full((num_items,), num_frames))


def blip2_config(**qformer: object) -> transformers.Blip2Config:
    sizes = {"hidden_size": E, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.Blip2VisionConfig(**sizes, image_size=28, patch_size=14, layer_norm_eps=1e-5)
    text = transformers.OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                  word_embed_proj_dim=16)  # fmt: skip
    former = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
              "intermediate_size": 128, "encoder_hidden_size": E} | qformer  # fmt: skip
    return transformers.Blip2Config(
        vision_config=vision,
        qformer_config=transformers.Blip2QFormerConfig(**former),
        text_config=text,
        num_query_tokens=Q,
        image_text_hidden_size=16,
    )


LAVIS = [
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^vision_model\.", "visual_encoder."),
    (r"^(?:qformer\.layernorm|embeddings\.LayerNorm)\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention\.", "attention.self."),
    (r"^(vision|text)_projection", r"\1_proj"),
]


def as_lavis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names -> LAVIS's, as transformers' own conversion script has it, the other way round."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in LAVIS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed | {"temp": torch.tensor(0.07), "Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}


@pytest.mark.parametrize("lavis", [False, True], ids=["huggingface", "lavis"])
def test_bert_base_size_gives_blip2s_outputs(lavis: bool) -> None:
    config = transformers.Blip2QFormerConfig(encoder_hidden_size=1408, cross_attention_frequency=2)
    peer = randomize(transformers.Blip2QFormerModel(config))
    queries = torch.randn(1, 32, 768) * 0.02
    ln_vision = randomize(torch.nn.LayerNorm(1408))
    state = {f"qformer.{k}": v for k, v in peer.state_dict().items()} | {"query_tokens": queries}
    state |= {f"vision_model.post_layernorm.{k}": v for k, v in ln_vision.state_dict().items()}
    ours = QFormer(encoder_width=1408).eval()
    unused = import_blip2(as_lavis(state) if lavis else state, ours)
    assert set(unused) <= {"temp", "Qformer.bert.embeddings.position_ids"}
    x = features(2, 33, 1408)
    with torch.no_grad():
        expected = peer(queries.expand(2, -1, -1), encoder_hidden_states=ln_vision(x.x)).last_hidden_state
        assert (ours(x).x - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("lavis", [False, True], ids=["huggingface", "lavis"])
def test_whole_blip2_from_pixels(lavis: bool) -> None:
    """A Blip2ForConditionalGeneration checkpoint; its encoder is read at layer=-1, before ln_vision."""
    peer = randomize(transformers.Blip2ForConditionalGeneration(blip2_config()))
    state = peer.state_dict()
    ours = QFormer(E, **SMALL).eval()
    unused = import_blip2(as_lavis(state) if lavis else state, ours)
    assert any(name.startswith(("vision_model", "visual_encoder")) for name in unused)
    assert not any(re.search(r"qformer|ln_vision|post_layernorm|query_tokens", name) for name in unused)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        image = peer.vision_model(pixels).last_hidden_state
        queries = peer.query_tokens.expand(2, -1, -1)
        expected = peer.qformer(queries, encoder_hidden_states=image).last_hidden_state
        got = ours(VisionEncoder(peer.vision_model, layer=-1)(pixel_values=pixels)).x
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("lavis", [False, True], ids=["huggingface", "lavis"])
def test_text_parts(lavis: bool) -> None:
    peer = randomize(transformers.Blip2ForImageTextRetrieval(blip2_config(use_qformer_text_input=True)))
    state = peer.state_dict()
    ours = QFormer(E, **SMALL, vocab_size=30).eval()
    import_blip2(as_lavis(state) if lavis else state, ours)
    text = torch.randint(0, 30, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x = features()
    with torch.no_grad():
        normed = Features(peer.vision_model.post_layernorm(x.x), x.lengths)
        both = torch.cat([torch.ones(2, Q, dtype=torch.long), mask], 1)
        embedded = peer.embeddings(text, query_embeds=peer.query_tokens.expand(2, -1, -1))
        expected = peer.qformer(embedded, Q, both, encoder_hidden_states=normed.x).last_hidden_state
        got = ours.encode(x, text, both.bool()[:, None])
        alone = peer.qformer(peer.embeddings(text), 0, mask).last_hidden_state
    assert (got - expected).abs()[both.bool()].max() <= 1e-5
    assert (ours.encode(None, text, mask.bool()[:, None]) - alone).abs()[mask.bool()].max() <= 1e-5


def test_import_refuses_what_does_not_fit() -> None:
    state = transformers.Blip2ForConditionalGeneration(blip2_config()).state_dict()
    with pytest.raises(ValueError, match=r"missing: \['ln_vision\.bias', 'ln_vision\.weight'\]"):
        import_blip2({k: v for k, v in state.items() if "post_layernorm" not in k}, QFormer(E, **SMALL))
    with pytest.raises(ValueError, match=r"queries: \(4, 32\), not \(5, 32\)"):
        import_blip2(state, QFormer(E, **SMALL | {"num_queries": 5}))
    with pytest.raises(ValueError, match=r"missing: \['blocks\.3\."):
        import_blip2(state, QFormer(E, **SMALL | {"depth": 4}))
    with pytest.raises(ValueError, match=r"missing: .*text_ffn"):
        import_blip2(state, QFormer(E, **SMALL, vocab_size=30))


def test_import_of_another_depth_is_not_silently_cut() -> None:
    state = transformers.Blip2ForConditionalGeneration(blip2_config()).state_dict()
    unused = import_blip2(state, QFormer(E, **SMALL | {"depth": 2}))
    assert any(name.startswith("qformer.encoder.layer.2.") for name in unused)


def test_padding_and_batch_change_nothing() -> None:
    former = randomize(QFormer(E, **SMALL))
    x, lengths = torch.randn(3, 9, E), torch.tensor([9, 4, 1])
    x[1, 4:] = 1e4
    together = former(Features(x, lengths))
    assert together.x.shape == (3, Q, 32)
    assert together.lengths.tolist() == [Q] * 3
    for i, length in enumerate(lengths.tolist()):
        alone = former(Features(x[i : i + 1, :length], lengths[i : i + 1])).x[0]
        torch.testing.assert_close(together.x[i], alone, atol=1e-5, rtol=1e-5)


def test_no_items_and_no_features() -> None:
    former = randomize(QFormer(E, **SMALL))
    assert former(Features(torch.zeros(0, 9, E), torch.zeros(0, dtype=torch.long))).x.shape == (0, Q, 32)


def test_gradients_reach_every_parameter() -> None:
    former = QFormer(E, **SMALL, vocab_size=30, max_text=5).train()
    hidden = former.encode(features(), torch.randint(0, 30, (2, 5)))
    (hidden * torch.randn_like(hidden)).sum().backward()
    assert [name for name, p in former.named_parameters() if p.grad is None] == []
    # a constant added to all keys changes no softmax: these alone are zero, up to rounding
    still = [n for n, p in former.named_parameters() if p.grad.abs().max() < 1e-6 and not n.endswith("key.bias")]
    assert still == []


def test_cross_attention_stands_in_every_nth_layer() -> None:
    former = QFormer(E, width=32, depth=6, heads=4, cross_every=3)
    assert [block.cross is not None for block in former.blocks] == [True, False, False] * 2


def test_positions_pack_texts_in_one_row() -> None:
    """Two texts side by side, masked from each other, give what each gives alone."""
    former = randomize(QFormer(E, **SMALL, vocab_size=30, max_text=5))
    a, b = torch.randint(0, 30, (1, 3)), torch.randint(0, 30, (1, 5))
    owner = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    at = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = former.encode(None, torch.cat([a, b], 1), owner[:, :, None] == owner[:, None], at)
    apart = torch.cat([former.encode(None, a), former.encode(None, b)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="width 30 is not divisible by heads 4"):
        QFormer(E, width=30, heads=4)
    with pytest.raises(ValueError, match="vocab_size"):
        QFormer(E, **SMALL).encode(features(), torch.zeros(2, 1, dtype=torch.long))


def test_dropped_features_are_not_read_in_training_and_all_are_afterwards() -> None:
    torch.manual_seed(0)
    former = QFormer(8, width=16, depth=2, heads=2, num_queries=3, cross_every=1, dropout=0.0, drop_features=0.5)
    x = torch.randn(1, 10, 8, requires_grad=True)
    former(Features(x, torch.tensor([10]))).x.square().sum().backward()
    assert x.grad is not None
    unread = (x.grad[0].abs().sum(-1) == 0).sum()
    assert 0 < unread < 10
    whole = former.eval()(Features(x, torch.tensor([10]))).x
    torch.testing.assert_close(whole, former(Features(x, torch.tensor([10]))).x)
    single = former.train()(Features(torch.randn(64, 1, 8), torch.ones(64, dtype=torch.long))).x
    assert single.isfinite().all()


def test_a_share_of_dropped_features_has_bounds() -> None:
    with pytest.raises(ValueError, match=r"drop_features=1\.0"):
        QFormer(8, width=16, depth=1, heads=2, drop_features=1.0)
