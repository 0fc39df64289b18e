"""What GPUs count and choose by in calibration, against the C++ kernels, on the CPU."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.simulation.fast import kernels, observers

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 5, 6, 7), None), ((4, 5, 6, 7), 0), ((4, 5, 6, 7), 1), ((3, 1000), 1), ((70000,), None)]
)
def test_counts_are_the_same(shape: tuple[int, ...], axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_AT_A_TIME", 500)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=generator)
    numbers.view(-1)[3] = float("nan")
    of_range = [size if at == axis else 1 for at, size in enumerate(shape)]
    low, high = -torch.rand(of_range, generator=generator) - 0.1, torch.rand(of_range, generator=generator) + 0.1
    counted = observers.counted_by_bin(numbers, low, high, 512)
    assert torch.equal(counted, observers.histograms(numbers, low, high, 512))
    assert counted.sum() == numbers.numel() - 1


def test_the_noise_of_grids_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_AT_A_TIME", 200_000)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (7, 512), generator=generator).float()
    centers = torch.randn(7, 512, generator=generator).sort(dim=1).values
    scales = torch.rand(7, 101, generator=generator) * 0.1 + 0.01
    offsets = torch.round(-torch.rand(7, 101, generator=generator) * 100)
    arguments = counts, centers, scales, offsets, 255, 3.0
    ours, theirs = observers.noise_of_all_grids(*arguments), observers.quantization_noise(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert torch.equal(ours.argmin(dim=1), theirs.argmin(dim=1))
