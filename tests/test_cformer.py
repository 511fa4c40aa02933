"""C-Former: padding, limits, and weights of BERT's format against transformers' own BertModel."""

import pytest
import torch

from x2l.interfaces.cformer import CFormer, import_bert
from x2l.types import Features


def tiny(in_width: int = 16, **sizes: int) -> CFormer:
    torch.manual_seed(0)
    return CFormer(in_width, **{"width": 16, "depth": 2, "heads": 2, "max_positions": 10, **sizes}).eval()


def bert(**sizes: int):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    for parameter in model.parameters():  # the default biases and norms are 0 and 1: a swap would not show
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def agree(model, cformer: CFormer, lengths: list[int]) -> None:
    x = torch.randn(len(lengths), max(lengths), model.config.hidden_size)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state[mask]
        got = cformer(Features(x, torch.tensor(lengths))).x
    torch.testing.assert_close(got[mask], expected, atol=1e-5, rtol=0)
    assert (got[~mask] == 0).all()


@pytest.mark.slow
def test_bert_base_weights_give_bert_outputs():
    model = bert()
    cformer = CFormer(768).eval()
    unused = import_bert(model.state_dict(), cformer)
    assert unused == ["embeddings.word_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"]
    agree(model, cformer, [17, 5, 1])


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_prefix_and_old_norm_names():
    model = bert(max_position_embeddings=10, **SMALL)
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    } | {"cls.predictions.bias": torch.zeros(50)}
    cformer = tiny()
    unused = import_bert(old, cformer)
    assert "cls.predictions.bias" in unused
    assert "bert.embeddings.word_embeddings.weight" in unused
    agree(model, cformer, [4, 10])


def test_import_is_strict():
    state = bert(max_position_embeddings=10, **SMALL).state_dict()
    with pytest.raises(ValueError, match=r"missing: \['blocks.2.attention.key.bias'"):
        import_bert(state, tiny(depth=3))
    with pytest.raises(ValueError, match=r"extra: \['encoder.layer.1.attention.self.query.weight'"):
        import_bert(state, tiny(depth=1))
    with pytest.raises(ValueError, match=r"positions.weight: \(10, 16\), not \(12, 16\)"):
        import_bert(state, tiny(max_positions=12))
    with pytest.raises(ValueError, match="token_type_embeddings"):
        import_bert({name: tensor for name, tensor in state.items() if "token_type" not in name}, tiny())


def test_import_leaves_the_projection_alone():
    cformer = tiny(in_width=6)
    before = cformer.project.weight.clone()
    import_bert(bert(max_position_embeddings=10, **SMALL).state_dict(), cformer)
    assert torch.equal(cformer.project.weight, before)


def test_an_utterance_does_not_see_the_batch_or_its_padding():
    cformer = tiny(in_width=6)
    lengths = torch.tensor([7, 3, 0, 1])
    x = torch.randn(4, 7, 6)
    x[torch.arange(7) >= lengths[:, None]] = float("nan")
    whole = cformer(Features(x, lengths))
    assert torch.equal(whole.lengths, lengths)
    assert whole.x.isfinite().all()
    for n, length in enumerate(lengths.tolist()):
        alone = cformer(Features(x[n : n + 1, :length], lengths[n : n + 1])).x
        torch.testing.assert_close(whole.x[n : n + 1, :length], alone, atol=1e-6, rtol=0)
        assert (whole.x[n, length:] == 0).all()


def test_order_matters():
    cformer = tiny()
    x = torch.randn(1, 5, 16)
    lengths = torch.tensor([5])
    forward, backward = cformer(Features(x, lengths)).x, cformer(Features(x.flip(1), lengths)).x.flip(1)
    assert (forward - backward).abs().max() > 1e-3


def test_gradients_are_finite_with_an_empty_utterance():
    cformer = tiny(in_width=6).train()
    x = torch.randn(2, 4, 6, requires_grad=True)
    cformer(Features(x, torch.tensor([4, 0]))).x.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cformer.parameters())


def test_limits():
    cformer = tiny()
    assert cformer(Features(torch.zeros(2, 0, 16), torch.tensor([0, 0]))).x.shape == (2, 0, 16)
    with pytest.raises(ValueError, match=r"11 CIF embeddings.*10 positions"):
        cformer(Features(torch.zeros(1, 11, 16), torch.tensor([11])))
