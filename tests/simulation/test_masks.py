"""What is masked in front of a softmax takes no part in its range, however the network's code writes minus infinity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, emulated

LENGTH = 10
WORDS = torch.randn(8, LENGTH, 16, generator=torch.Generator().manual_seed(0))
KEPT = (torch.arange(LENGTH) < torch.tensor([[10], [6], [4], [9], [8], [7], [5], [3]])).float()
LEAST = torch.finfo(torch.float32).min

Masking = Callable[["Attention", Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Scores, masked in the way of a function of the scores and of what is kept, and what is made of them."""

    def __init__(self, masked: Masking, scores: Callable[[Tensor], Tensor] = lambda scores: scores) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.scores = masked, scores
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("past", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None])
        self.register_buffer("future", torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None])
        self.register_buffer("nothing", torch.tensor(-1e9))

    def forward(self, words: Tensor, kept: Tensor) -> Tensor:
        query = self.query(words)
        scores = self.scores(query @ query.transpose(-1, -2) * 0.25)
        return self.masked(self, scores, kept).softmax(-1) @ self.value(words)


def assigned(scores: Tensor, mask: Tensor, value: float) -> Tensor:
    scores = scores.clone()
    scores[mask.expand(scores.shape)] = value
    return scores


# What the mask is, as the network is given it, and what is done with it.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Masking]] = {
    "filled": (lambda kept: kept, lambda m, s, k: s.masked_fill(k[:, None] == 0, -1e9)),
    "filled in place": (lambda kept: kept.bool(), lambda m, s, k: s.masked_fill_(~k[:, None], -torch.inf)),
    "filled with a tensor": (lambda kept: kept, lambda m, s, k: s.masked_fill(k[:, None] == 0, m.nothing)),
    "zeros filled": (lambda kept: kept, lambda m, s, k: s + torch.zeros_like(s).masked_fill(k[:, None] < 1, LEAST)),
    "numbers chosen": (lambda kept: kept, lambda m, s, k: s + torch.where(k[:, None] > 0, 0.0, -1e9)),
    "numbers chosen by truth": (lambda kept: kept.bool(), lambda m, s, k: s + torch.where(k[:, None], 0.0, -torch.inf)),
    "scores chosen": (lambda kept: kept, lambda m, s, k: torch.where(k[:, None] > 0, s, -1e9)),
    "infinity chosen": (lambda kept: kept, lambda m, s, k: torch.where(k[:, None] > 0, s, -torch.inf)),
    "a number's tensor chosen": (lambda kept: kept, lambda m, s, k: torch.where(k[:, None] > 0, s, m.nothing)),
    "full tensor chosen": (lambda kept: kept, lambda m, s, k: torch.where(k[:, None] > 0, s, torch.full_like(s, -1e9))),
    "causal, chosen": (lambda kept: kept, lambda m, s, k: torch.where(m.past, s, torch.full([], LEAST))),
    "causal, added": (lambda kept: kept, lambda m, s, k: s + m.future),
    "causal, -1000 added": (lambda kept: kept, lambda m, s, k: s + m.future.clamp(min=-1000.0)),
    "causal, -100 added": (lambda kept: kept, lambda m, s, k: s + m.future.clamp(min=-100.0)),
    "causal, by index": (lambda kept: kept, lambda m, s, k: assigned(s, ~m.past, -1e9)),
    "by index": (lambda kept: kept, lambda m, s, k: assigned(s, k[:, None] == 0, -torch.inf)),
    "product": (lambda kept: kept, lambda m, s, k: s + (1 - k[:, None]) * LEAST),
    "product of integers": (lambda kept: kept.long(), lambda m, s, k: s + (1.0 - k[:, None].float()) * -10000.0),
    "positive product": (lambda kept: kept, lambda m, s, k: s + (k[:, None] - 1) * 1e9),
    "product, subtracted": (lambda kept: kept, lambda m, s, k: s - 1e9 * (1 - k[:, None])),
    "logarithm": (lambda kept: kept, lambda m, s, k: s + k[:, None].log()),
    "given, to be added": (lambda kept: (1 - kept) * -1e9, lambda m, s, k: s + k[:, None]),
    "given, infinite": (lambda kept: kept.log(), lambda m, s, k: s + k[:, None]),
    "given, as BERT's": (lambda kept: (1 - kept) * -10000.0, lambda m, s, k: s + k[:, None]),
    "exponential": (
        lambda kept: kept,
        lambda m, s, k: (lambda e: (e / e.sum(-1, keepdim=True)).log())((s + (1 - k[:, None]) * -1e9).exp()),
    ),
    "scaled behind": (lambda kept: kept, lambda m, s, k: s.masked_fill(k[:, None] == 0, -torch.inf) * 0.125),
    "divided behind": (lambda kept: kept, lambda m, s, k: (s + (1 - k[:, None]) * -1e9) / 8),
}  # fmt: skip


def quantized(
    way: str, scores: Callable[[Tensor], Tensor] = lambda scores: scores, **recipe: Any
) -> tuple[nn.Module, QuantizedNetwork, list[Tensor]]:
    given, masked = WAYS[way]
    network = Attention(masked, scores).eval()
    inputs = [WORDS, given(KEPT)]
    return copy.deepcopy(network), calibrated(network, call(*inputs), **recipe), inputs


def psnr(expected: Tensor, actual: Tensor) -> float:
    return float(10 * torch.log10((expected.max() - expected.min()) ** 2 / (expected - actual).square().mean()))


@pytest.mark.parametrize("way", WAYS)
def test_scores_keep_their_steps(way: str, tmp_path: Path) -> None:
    network, known, inputs = quantized(way)
    expected = network(*inputs)
    assert expected.isfinite().all()
    # without a mask it is 43 dB; with a range down to -10000, 17
    assert psnr(expected, known.network(*inputs)) > 36
    samples = [call(*(tensor[index : index + 1] for tensor in inputs)) for index in range(3)]
    bundle = export_bundle(known, tmp_path / "bundle", samples)
    assert bundle.manifest.parity.psnr_db > 60
    if NO_EMULATOR is None:
        one = {"words": inputs[0][1:2], "kept": inputs[1][1:2]}
        given = {name: tensor.numpy() for name, tensor in one.items() if name in bundle.manifest.input_names}
        report, (output,) = emulated(onnx.load(bundle.qdq), tmp_path / "device", **given)
        assert not report.layers["CPU"]
        rounded = known.network(*(tensor[1:2] for tensor in inputs)).detach()
        assert psnr(rounded, torch.from_numpy(output)) > 40


@pytest.mark.parametrize("way", [way for way in WAYS if "causal" not in way and way != "logarithm"])
def test_no_calibration_sample_has_to_mask_anything(way: str) -> None:
    given, masked = WAYS[way]
    network = Attention(masked).eval()
    known = calibrated(copy.deepcopy(network), call(WORDS, given(torch.ones_like(KEPT))))
    inputs = [WORDS, given(KEPT)]
    assert psnr(network(*inputs), known.network(*inputs)) > 33


@pytest.mark.parametrize("estimator", ["tf_enhanced", "percentile"])
def test_every_estimator_leaves_room(estimator: str) -> None:
    network, known, inputs = quantized("filled", range_estimator=estimator)
    assert psnr(network(*inputs), known.network(*inputs)) > 34


def test_a_cached_pass_leaves_the_same_room(tmp_path: Path) -> None:
    ends = []
    for _ in range(2):
        _, known, inputs = quantized("given, to be added")
        calibrate(known, [call(*inputs)], cache=StatisticsCache(tmp_path))
        ends.append([float(quantizer.get_min()) for quantizer in known.quantizers() if quantizer.shape == ()])
    assert min(ends[0]) < -50
    assert ends[0] == ends[1]


@pytest.mark.parametrize("way", ["causal, added", "given, infinite", "infinity chosen", "product"])
def test_training_stays_finite(way: str) -> None:
    network, known, inputs = quantized(way)
    known.network.train()
    known.network(*inputs).square().sum().backward()
    network(*inputs).square().sum().backward()
    for name, parameter in known.network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    expected, actual = network.query.weight.grad, known.network.query.weight.grad
    assert torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("way", ["filled", "scores chosen", "numbers chosen", "by index"])
def test_scores_far_below_zero_are_not_below_what_is_masked(way: str) -> None:
    """A number such as -50 in the place of infinity would be the largest of all."""
    network, known, inputs = quantized(way, lambda scores: scores - 300, precision="w8a16")
    assert psnr(network(*inputs), known.network(*inputs)) > 50


class Sharp(nn.Module):
    """The place of the largest value by a softmax of multiples: nothing is masked there, whatever the numbers are."""

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.scores = nn.Linear(16, 16), scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.linear(x)).softmax(-1)


@pytest.mark.parametrize("scores", [lambda x: x * 1e5, lambda x: x * 1e5 + 1.0, lambda x: 2.0 - x * 1e5])
def test_a_factor_of_scores_stays(scores: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = Sharp(scores).eval()
    expected = network(WORDS)
    known = calibrated(network, call(WORDS), precision="w8a16")
    found = known.network(WORDS)
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
    assert found.max(-1).values.mean() > 0.98


class Nearest(nn.Module):
    """Which of some places is nearest, by distances that are large for some samples and larger for others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.behind = nn.Linear(16, 16), nn.Linear(8, 4)
        self.register_buffer("places", torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        products = 2 * (x @ self.places.T)
        scores = products - (self.places**2).sum(1) - (x**2).sum(-1, keepdim=True)
        return self.behind(scores.softmax(-1))


def test_distances_are_not_masked() -> None:
    torch.manual_seed(0)
    network = Nearest().eval()
    scales = torch.linspace(0.2, 3.0, 8)[:, None, None]
    network.linear.weight.data *= 20
    network.places *= 9
    known = calibrated(copy.deepcopy(network), call(WORDS * scales), precision="w8a16")
    expected = network(WORDS * scales)
    assert psnr(expected, known.network(WORDS * scales)) > 30


@pytest.mark.parametrize("function", [nn.Softmax(-1), nn.LogSoftmax(-1)])
def test_nothing_masked_changes_nothing(function: nn.Module) -> None:
    """Logits of a trained classifier lie far apart, and their logarithms are what a loss or a beam search reads."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), function).eval()
    network[0].weight.data *= 20
    known = calibrated(copy.deepcopy(network), call(WORDS))
    assert psnr(network(WORDS), known.network(WORDS)) > 38


def test_what_is_returned_keeps_its_steps() -> None:
    """Logits of moves that are not allowed, for a softmax elsewhere."""
    policy = Policy().eval()
    known = calibrated(policy, call(WORDS))
    wanted, found = policy(WORDS).softmax(-1), known.network(WORDS).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)
    assert (found[..., 8:] < 1e-6).all()


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).masked_fill(torch.arange(12) >= 8, -1e9)


def test_only_masks_may_be_infinite() -> None:
    inputs = [WORDS.clone(), torch.zeros_like(KEPT)]
    inputs[0][3, 2, 1] = -torch.inf
    with pytest.raises(CalibrationError, match="batch 0 holds Inf"):
        calibrated(Attention(WAYS["given, to be added"][1]).eval(), call(*inputs))
    inputs = [WORDS, torch.full_like(KEPT, torch.nan)]
    with pytest.raises(CalibrationError, match="batch 0 holds NaN"):
        calibrated(Attention(WAYS["given, to be added"][1]).eval(), call(*inputs))
