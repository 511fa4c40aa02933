"""CIF against a loop in float64, torch-cif, FunASR, and itself: other batches, other chunkings."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l.interfaces.cif import CIF, cif, start, stream
from x2l.types import Features

quick = settings(deadline=None, max_examples=50)


def slow_cif(x_FC: torch.Tensor, alpha_F: torch.Tensor, threshold: float = 0.5):
    """One utterance by the definition, a fire at a time: embeddings (U, C) and fire times, in float64."""
    x_FC = x_FC.double()
    fired, times, total = [], [], 0.0
    current = x_FC.new_zeros(x_FC.shape[1])
    for t, alpha in enumerate(alpha_F.tolist()):
        before, total = total, total + alpha
        while total >= len(fired) + 1:
            edge = len(fired) + 1
            fired.append(current + (edge - max(before, edge - 1)) * x_FC[t])
            times.append(t + (edge - before) / alpha)
            current = torch.zeros_like(current)
        current = current + (total - max(before, len(fired))) * x_FC[t]
    if total - len(fired) > threshold:
        fired.append(current / (total - len(fired)))
        times.append(len(alpha_F))
    return torch.stack(fired) if fired else x_FC[:0], torch.tensor(times, dtype=torch.float64)


def random_batch(seed: int, num_items: int, num_frames: int, scale: float, width: int = 4):
    """Frames, weights up to ``scale`` and lengths from 0 on; everything beyond the lengths is NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_items, num_frames, width, generator=generator)
    alpha = scale * torch.rand(num_items, num_frames, generator=generator)
    lengths = torch.randint(0, num_frames + 1, (num_items,), generator=generator)
    beyond = torch.arange(num_frames) >= lengths[:, None]
    return x.masked_fill(beyond[..., None], math.nan), alpha.masked_fill(beyond, math.nan), lengths


batches = st.builds(
    random_batch, st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 24), st.sampled_from([0.0, 0.1, 0.6, 1.0, 4.0])
)


@quick
@given(batches)
def test_equals_the_loop(batch):
    x, alpha, lengths = batch
    output = cif(x, alpha, lengths)
    assert output.x.shape[1] == output.fire_times.shape[1] == output.lengths.max()
    for n, length in enumerate(lengths.tolist()):
        expected, times = slow_cif(x[n, :length], alpha[n, :length])
        num = int(output.lengths[n])
        assert num == len(expected)
        torch.testing.assert_close(output.x[n, :num].double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(output.fire_times[n, :num], times, atol=1e-9, rtol=0)
        assert (output.x[n, num:] == 0).all()
        assert (output.fire_times[n, num:] == 0).all()
        torch.testing.assert_close(output.quantity[n], alpha[n, :length].sum(), atol=1e-4, rtol=0)


@quick
@given(batches, st.integers(0, 2**31))
def test_weights_are_conserved(batch, seed):
    """With one-hot frames the embeddings are the weights themselves."""
    _, alpha, lengths = batch
    num_items, num_frames = alpha.shape
    weights = cif(torch.eye(num_frames).double().expand(num_items, -1, -1), alpha, lengths).x
    output = cif(torch.ones(num_items, num_frames, 1).double(), alpha, lengths)
    for n in range(num_items):
        total = alpha[n, : lengths[n]].double().sum()
        num = int(output.lengths[n])
        assert num == math.floor(total) + (total % 1 > 0.5)
        torch.testing.assert_close(weights[n, :num].sum(1), torch.ones(num).double())
        used = weights[n, : math.floor(total)].sum(0)
        assert (used <= alpha[n].nan_to_num().double() + 1e-12).all()
        assert (weights[n] >= 0).all()


@quick
@given(batches, st.integers(0, 2**31))
def test_target_lengths_are_met_exactly(batch, seed):
    x, alpha, lengths = batch
    targets = torch.randint(0, 30, lengths.shape, generator=torch.Generator().manual_seed(seed))
    targets *= alpha.nansum(1) > 0
    output = cif(x, alpha, lengths, targets)
    assert torch.equal(output.lengths, targets)
    for n, (length, target) in enumerate(zip(lengths.tolist(), targets.tolist(), strict=True)):
        scaled = alpha[n, :length].double() / alpha[n, :length].double().sum() * (target + 1e-9)
        if target:
            expected = slow_cif(x[n, :length], scaled)[0]
            torch.testing.assert_close(output.x[n, :target].double(), expected, atol=1e-5, rtol=0)
        assert torch.allclose(output.quantity[n], alpha[n, :length].sum())  # of the unscaled weights


@quick
@given(batches)
def test_an_utterance_does_not_see_the_batch(batch):
    x, alpha, lengths = batch
    together = cif(x, alpha, lengths)
    for n, length in enumerate(lengths.tolist()):
        alone = cif(x[n : n + 1, :length], alpha[n : n + 1, :length], lengths[n : n + 1])
        num = int(together.lengths[n])
        assert num == alone.lengths[0]
        assert torch.equal(together.x[n, :num], alone.x[0])
        assert torch.equal(together.fire_times[n, :num], alone.fire_times[0])


@quick
@given(batches)
def test_fire_times_are_monotone_and_inside_the_audio(batch):
    x, alpha, lengths = batch
    output = cif(x, alpha, lengths)
    for times, num, length in zip(output.fire_times, output.lengths, lengths, strict=True):
        assert (times[:num].diff() > 0).all()
        assert ((times[:num] > 0) & (times[:num] <= length)).all()


@pytest.mark.parametrize("scale", [0.7, 1.0, 3.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients(scale, scaled):
    for seed in range(5):  # some of these end in a tail that fires, some in one that does not
        _, alpha, lengths = random_batch(seed, 3, 6, scale)
        x = torch.randn(3, 6, 2).double().requires_grad_()
        alpha = alpha.nan_to_num(0.3).double().requires_grad_()
        targets = torch.tensor([2, 4, 9]) * (lengths > 0) if scaled else None
        assert torch.autograd.gradcheck(lambda x, alpha, n, t: cif(x, alpha, n, t).x, (x, alpha, lengths, targets))


def test_gradients_do_not_read_the_padding():
    x, alpha, lengths = random_batch(3, 4, 20, 1.0)
    x.requires_grad_()
    alpha.requires_grad_()
    output = cif(x, alpha, lengths)
    (output.x.sum() + output.quantity.sum()).backward()
    beyond = torch.arange(20) >= lengths[:, None]
    assert x.grad.isfinite().all()
    assert alpha.grad.isfinite().all()
    assert (x.grad[beyond] == 0).all()
    assert (alpha.grad[beyond] == 0).all()


def test_torch_cif():
    """Right for alpha > 1, in float32; its tail includes the threshold, which no random weight hits."""
    torch_cif = pytest.importorskip("torch_cif")
    for scale in (0.3, 1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 60, 8, generator=generator)
        alpha = scale * torch.rand(4, 60, generator=generator)
        lengths = torch.tensor([60, 41, 7, 1])
        padding = torch.arange(60) >= lengths[:, None]
        theirs = torch_cif.cif_function(x, alpha, padding_mask=padding, unbound_alpha=True)
        ours = cif(x, alpha, lengths)
        assert torch.equal(ours.lengths, theirs["cif_lengths"][0])
        torch.testing.assert_close(ours.x, theirs["cif_out"][0], atol=2e-4, rtol=0)
        targets = torch.tensor([20, 50, 9, 3])
        theirs = torch_cif.cif_function(x, alpha, padding_mask=padding, target_lengths=targets, unbound_alpha=True, eps=0.0)
        torch.testing.assert_close(cif(x, alpha, lengths, targets).x, theirs["cif_out"][0], atol=2e-4, rtol=0)


@pytest.mark.slow  # the import alone takes half a minute
def test_funasr():
    """Its loop is right for alpha <= 1; it drops the tail but leaves a zero row where the sum rounds up."""
    predictor = pytest.importorskip("funasr.models.paraformer.cif_predictor", reason="pip install --no-deps funasr")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 60, 8, generator=generator)
    alpha = torch.rand(4, 60, generator=generator)
    theirs, _ = predictor.cif(x, alpha, threshold=1.0)
    ours = cif(x, alpha, torch.full((4,), 60), tail_threshold=1.0)
    for n, num in enumerate(ours.lengths):
        torch.testing.assert_close(ours.x[n, :num], theirs[n, :num], atol=2e-5, rtol=0)


def test_precision_at_2048_frames():
    x, alpha, _ = random_batch(0, 4, 2048, 1.0, width=32)
    x, alpha, lengths = torch.randn(x.shape), torch.rand(alpha.shape), torch.full((4,), 2048)
    exact = cif(x.double(), alpha.double(), lengths)
    output = cif(x, alpha, lengths)
    assert torch.equal(output.lengths, exact.lengths)
    assert (output.x - exact.x).abs().max() <= 1e-6
    assert (slow_cif(x[0], alpha[0])[0] - exact.x[0, : exact.lengths[0]]).abs().max() < 1e-9


def test_no_fire_is_lost_in_ten_hours():
    alpha = torch.full((1, 450_000), 0.1)  # 12.5 Hz
    expected = Fraction(alpha[0, 0].item()) * 450_000
    output = cif(torch.ones(1, 450_000, 1), alpha, torch.tensor([450_000]), tail_threshold=1.0)
    assert output.lengths.item() == math.floor(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, alpha, lengths = random_batch(1, 4, 50, 1.0)
    x = x.nan_to_num(0.0).to(dtype).requires_grad_()
    output = cif(x, alpha, lengths)
    output.x.float().square().sum().backward()
    exact = cif(x.detach().double(), alpha, lengths)
    assert output.x.dtype == x.grad.dtype == dtype
    assert torch.equal(output.lengths, exact.lengths)
    torch.testing.assert_close(output.x.detach().double(), exact.x, atol=0.03, rtol=0)


def test_borderline_inputs():
    one = torch.tensor([1])
    frame = torch.tensor([[[2.0, 3.0]]])
    assert cif(frame, torch.tensor([[0.5]]), one).x.shape == (1, 0, 2)  # at the threshold: dropped
    assert torch.equal(cif(frame, torch.tensor([[0.6]]), one).x, frame)  # above: normalised
    assert torch.equal(cif(frame, torch.tensor([[1.0]]), one).x, frame)
    triple = cif(frame, torch.tensor([[3.0]]), one)
    assert torch.equal(triple.x, frame.expand(1, 3, 2))
    torch.testing.assert_close(triple.fire_times, torch.tensor([[1 / 3, 2 / 3, 1]]).double())
    silence = cif(torch.ones(2, 5, 2), torch.zeros(2, 5), torch.tensor([5, 0]))
    assert silence.x.shape == (2, 0, 2)
    assert silence.lengths.tolist() == [0, 0]
    assert cif(torch.ones(2, 0, 2), torch.ones(2, 0), torch.tensor([0, 0])).x.shape == (2, 0, 2)
    assert cif(torch.ones(0, 5, 2), torch.ones(0, 5), torch.zeros(0, dtype=torch.long)).x.shape == (0, 0, 2)


def test_silence_still_backpropagates():
    x, alpha = torch.ones(1, 5, 2, requires_grad=True), torch.full((1, 5), 0.01, requires_grad=True)
    output = cif(x, alpha, torch.tensor([5]))
    (output.x.sum() + (output.quantity - 3).abs().sum()).backward()
    assert (x.grad == 0).all()
    assert (alpha.grad == -1).all()


def test_errors():
    x, lengths = torch.ones(1, 3, 2), torch.tensor([3])
    for bad in (math.nan, -0.1, math.inf):
        with pytest.raises(ValueError, match="finite and >= 0"):
            cif(x, torch.tensor([[0.5, bad, 0.5]]), lengths)
        assert cif(x, torch.tensor([[0.5, 0.5, bad]]), torch.tensor([2])).lengths == 1  # beyond the length: not read
    with pytest.raises(ValueError, match="4 frames in a batch of 3"):
        cif(x, torch.ones(1, 3), torch.tensor([4]))
    with pytest.raises(ValueError, match=r"weights \(1, 3\)"):
        cif(x, torch.ones(1, 4), lengths)
    with pytest.raises(ValueError, match=r"\[0\] have a target length"):
        cif(x, torch.zeros(1, 3), lengths, torch.tensor([2]))
    with pytest.raises(ValueError, match="odd kernel"):
        CIF(8, kernel=4)


def collect(outputs, n: int):
    """The embeddings and fire times of stream n over all chunks."""
    x = torch.cat([output.x[n, : output.lengths[n]] for output in outputs])
    return x, torch.cat([output.fire_times[n, : output.lengths[n]] for output in outputs])


def cut(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    points = [0, *sorted(min(c, x.shape[1]) for c in cuts), x.shape[1]]
    return [x[:, a:b] for a, b in itertools.pairwise(points)]


cuttings = st.lists(st.integers(0, 40), max_size=12)


@quick
@given(st.integers(0, 2**31), st.integers(0, 40), st.sampled_from([0.0, 0.2, 1.0, 3.0]), cuttings)
def test_stream_equals_batch_at_every_chunking(seed, num_frames, scale, cuts):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_frames, 3, generator=generator)
    alpha = scale * torch.rand(2, num_frames, generator=generator)
    whole = cif(x, alpha, torch.full((2,), num_frames))
    state, outputs = start(x), []
    chunks = list(zip(cut(x, cuts), cut(alpha, cuts), strict=True))
    for i, (x_chunk, alpha_chunk) in enumerate(chunks):
        output, state = stream(state, x_chunk, alpha_chunk, last=i == len(chunks) - 1)
        outputs.append(output)
    for n in range(2):
        streamed, times = collect(outputs, n)
        assert len(streamed) == whole.lengths[n]
        torch.testing.assert_close(streamed, whole.x[n, : len(streamed)], atol=1e-5, rtol=0)
        torch.testing.assert_close(times, whole.fire_times[n, : len(streamed)], atol=1e-9, rtol=0)
    torch.testing.assert_close(sum(output.quantity for output in outputs), whole.quantity)


def test_an_embedding_fires_in_the_chunk_that_completes_it():
    alpha = torch.tensor([[0.4, 0.4, 0.4, 0.4]])
    x = torch.randn(1, 4, 2)
    state, fired = start(x), []
    for t in range(4):
        output, state = stream(state, x[:, t : t + 1], alpha[:, t : t + 1])
        fired.append(output.lengths.item())
    assert fired == [0, 0, 1, 0]
    tail, _ = stream(state, x[:, :0], alpha[:, :0], last=True)  # 0.6 is left
    assert tail.lengths.tolist() == [1]
    assert tail.fire_times.tolist() == [[4.0]]


def module(**sizes) -> CIF:
    torch.manual_seed(0)
    predictor = CIF(6, **sizes).eval()
    torch.nn.init.normal_(predictor.fc.weight, std=2.0)  # weights all over (0, 1)
    return predictor


def test_module_weights_by_hand():
    predictor = module()
    x = torch.randn(1, 7, 6)
    output = predictor(Features(x, torch.tensor([7])))
    padded = torch.cat([torch.zeros(2, 6), x[0], torch.zeros(2, 6)])
    hidden = [torch.einsum("ock,kc->o", predictor.conv.weight, padded[t : t + 5]) + predictor.conv.bias for t in range(7)]
    alpha = torch.sigmoid(predictor.fc(torch.stack(hidden)))[:, 0]
    expected, _ = slow_cif(x[0], alpha.detach())
    torch.testing.assert_close(output.x[0].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.quantity[0], alpha.sum())


def test_module_does_not_see_the_batch_or_its_padding():
    predictor = module()
    x, _, lengths = random_batch(5, 4, 30, 1.0, width=6)
    together = predictor(Features(x, lengths))
    for n, length in enumerate(lengths.tolist()):
        alone = predictor(Features(x[n : n + 1, :length], lengths[n : n + 1]))
        num = int(alone.lengths[0])
        assert num == together.lengths[n]
        torch.testing.assert_close(together.x[n, :num], alone.x[0], atol=1e-5, rtol=0)


def test_module_learns_the_quantity():
    """The quantity loss alone teaches the predictor to count, and reaches every parameter."""
    predictor = module().train()
    features, targets = Features(torch.randn(4, 20, 6), torch.tensor([20, 15, 10, 5])), torch.tensor([8, 6, 4, 2])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.02)
    for _ in range(60):
        output = predictor(features, targets)
        assert torch.equal(output.lengths, targets)
        loss = (output.quantity - targets).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in predictor.parameters())
        optimizer.step()
    assert loss < 4
    assert (predictor.eval()(features).lengths - targets).abs().max() <= 1


@quick
@given(st.integers(0, 2**31), st.integers(0, 40), cuttings, st.sampled_from([1, 3, 5]))
def test_module_stream_equals_batch_at_every_chunking(seed, num_frames, cuts, kernel):
    predictor = module(kernel=kernel)
    x = torch.randn(2, num_frames, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = predictor(Features(x, torch.full((2,), num_frames)))
    state, outputs = None, []
    chunks = cut(x, cuts)
    for i, chunk in enumerate(chunks):
        output, state = predictor.stream(state, chunk, last=i == len(chunks) - 1)
        outputs.append(output)
    for n in range(2):
        streamed, times = collect(outputs, n)
        assert len(streamed) == whole.lengths[n]
        torch.testing.assert_close(streamed, whole.x[n, : len(streamed)], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(times, whole.fire_times[n, : len(streamed)], atol=1e-4, rtol=1e-4)
