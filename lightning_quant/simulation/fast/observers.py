"""What calibration observes and how it chooses ranges: AIMET's analyzers, their histograms in one pass.

Importing this module imports AIMET.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.aimet import (
    PercentileEncodingAnalyzer,
    TfEnhancedEncodingAnalyzer,
    _get_minimum_scale,
    _Histogram,
    _HistogramObserver,
)
from lightning_quant.simulation.fast import kernels

# Values processed at a time where that takes several copies of them.
_AT_A_TIME = 2**24


class FastHistogramObserver(_HistogramObserver):
    """Histograms of all channels at once; batches after the first are counted once instead of twice."""

    stats: Any

    def reset_stats(self) -> None:
        """Forget what was seen."""
        self.stats = [_Histogram()] * len(self.stats)

    @torch.no_grad()
    def collect_stats(self, input_tensor: Tensor) -> Any:
        """Return the range of the batch per channel; for the first batch, which sets the bins, its histogram too."""
        if not _is_covered(self, input_tensor):
            return super().collect_stats(input_tensor)
        low, high = _range(input_tensor, self.shape)
        if not (low.isfinite().all() and high.isfinite().all()):
            return super().collect_stats(input_tensor)
        if self.stats[0].histogram is not None:
            return [_Histogram(min=low.view(()), max=high.view(()))]
        # as AIMET's _create_bin_edges does for one channel
        left, right = torch.where(low == high, low - 0.5, low), torch.where(low == high, high + 0.5, high)
        step = ((right - left) / self.num_bins).view(-1, 1)
        edges = torch.arange(0, self.num_bins + 1, device=step.device) * step + left.view(-1, 1)
        counts = histograms(input_tensor, left, edges[:, -1].contiguous().view(left.shape), self.num_bins)
        rows = zip(counts, edges, low.flatten(), high.flatten(), strict=True)
        return [_Histogram(*row) for row in rows]

    @torch.no_grad()
    def merge_stats(self, new_stats_list: Any, input_tensor: Tensor) -> None:
        """Add a batch; values beyond the bins count for the outermost ones."""
        (*others, new) = new_stats_list
        if self.stats[0].histogram is None or others or new.histogram is not None:
            super().merge_stats(new_stats_list, input_tensor)
            return
        now = self.stats[0]
        left, right = self._histogram_range_limit[0]
        low, high = new.min.clamp(left, now.bin_edges[0]), new.max.clamp(now.bin_edges[-1], right)
        if low != now.min or high != now.max:
            # AIMET spreads the old counts over wider bins when the range grows; an empty batch makes it do just that
            super().merge_stats([_Histogram(min=new.min, max=new.max)], input_tensor.new_empty((1, 0)))
            now = self.stats[0]
        counts = histograms(input_tensor, low.view(1), high.view(1), self.num_bins)
        self.stats[0] = _Histogram(now.histogram + counts[0], now.bin_edges, low, high)


class FastTfEnhancedEncodingAnalyzer(TfEnhancedEncodingAnalyzer):
    """The range with the least noise, of the same candidates as AIMET's."""

    def _select_best_candidates(self, test_deltas: Tensor, test_offsets: Tensor, stats: Any, num_steps: int) -> Any:
        counts = torch.stack([one.histogram for one in stats])
        if counts.dtype is not torch.float32 or not _has_kernel(counts):
            return super()._select_best_candidates(test_deltas, test_offsets, stats, num_steps)
        edges = torch.stack([one.bin_edges for one in stats])
        width = edges[:, 1:2] - edges[:, :1]
        centers = edges[:, :1] + width / 2 + width * torch.arange(counts.shape[1], device=counts.device)
        scales, offsets = test_deltas.flatten(1), test_offsets.expand(test_deltas.shape).flatten(1).contiguous()
        noise = quantization_noise(counts, centers, scales.contiguous(), offsets, num_steps, self.gamma)
        best = noise.argmin(dim=1, keepdim=True)
        if test_offsets.numel() == 1:
            return scales.gather(1, best), test_offsets
        return scales.gather(1, best), offsets.gather(1, best)


class FastPercentileEncodingAnalyzer(PercentileEncodingAnalyzer):
    """Percentiles of all channels at once."""

    @torch.no_grad()
    def compute_encodings_from_stats(self, stats: Any, num_steps: int, is_symmetric: bool) -> Any:
        """Return the least and the greatest value of each channel's range."""
        if stats[0].histogram is None or num_steps <= 0 or len(stats) == 1:
            return super().compute_encodings_from_stats(stats, num_steps, is_symmetric)
        sums = torch.stack([one.histogram for one in stats]).cumsum(dim=1)
        edges = torch.stack([one.bin_edges for one in stats])
        if self.percentile == 100:
            low, high = edges[:, :1], edges[:, -1:]
        else:
            total = sums[:, -1:]
            low = edges.gather(1, torch.searchsorted(sums, total * (1 - self.percentile / 100)))
            high = edges.gather(1, torch.searchsorted(sums, total * self.percentile / 100))
        dtype, shape = stats[0].min.dtype, self.observer.shape
        low, high = _with_zero(low[:, 0], high[:, 0], num_steps, is_symmetric)
        return low.to(dtype).view(shape), high.to(dtype).view(shape)


def _with_zero(low: Tensor, high: Tensor, steps: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Adjust many ranges as AIMET's ``adjust_min_max``: with zero inside, finite, not too narrow, symmetric or not."""
    limit = torch.finfo(low.dtype).max
    low, high = low.clamp(-limit, 0), high.clamp(0, limit)
    below, above = math.ceil(steps / 2), math.floor(steps / 2)
    smallest = _get_minimum_scale(steps)
    narrow = (high - low) / steps < smallest
    if not symmetric:
        return low, torch.where(narrow, high + smallest * steps, high)
    low = torch.where(narrow, low - smallest * below, low)
    high = torch.where(narrow, high + smallest * above, high)
    step = torch.maximum(high / above, -low / below)
    return -below * step, above * step


_FAST = {
    TfEnhancedEncodingAnalyzer: FastTfEnhancedEncodingAnalyzer,
    PercentileEncodingAnalyzer: FastPercentileEncodingAnalyzer,
}


def accelerate_analyzer(analyzer: Any) -> None:
    """Let one of AIMET's analyzers use these classes, in place."""
    analyzer.__class__ = _FAST.get(type(analyzer), type(analyzer))
    if type(getattr(analyzer, "observer", None)) is _HistogramObserver:
        analyzer.observer.__class__ = FastHistogramObserver


def slow_down_analyzer(analyzer: Any) -> None:
    """Give an analyzer its own class back."""
    for slow, fast in _FAST.items():
        if type(analyzer) is fast:
            analyzer.__class__ = slow
    if type(getattr(analyzer, "observer", None)) is FastHistogramObserver:
        analyzer.observer.__class__ = _HistogramObserver


def _is_covered(observer: Any, tensor: Tensor) -> bool:
    return (
        observer.block_size is None and tensor.dtype is torch.float32 and type(tensor) is Tensor and _has_kernel(tensor)
    )


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda or (tensor.is_cpu and kernels.unavailable() is None)


def histograms(tensor: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Count values in equal bins between ``low`` and ``high``, float32 [ranges, bins]: see ``calibration.cpp``."""
    if tensor.is_cpu:
        return torch.ops.lightning_quant.histograms(tensor, low, high, bins)
    return counted_by_bin(tensor, low, high, bins)


def counted_by_bin(tensor: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Compute :func:`histograms` in PyTorch's own operations, for all ranges at once."""
    ranges = low.numel()
    missing = tensor.dim() - low.dim()
    axis = next((missing + at for at, size in enumerate(low.shape) if size != 1), None)
    rows = tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).reshape(ranges, -1)
    left, width = low.reshape(-1, 1), (high - low).reshape(-1, 1)
    counts = torch.zeros(ranges * (bins + 1), dtype=torch.int64, device=tensor.device)
    first = torch.arange(ranges, device=tensor.device).view(-1, 1) * (bins + 1)
    for part in rows.split(max(1, _AT_A_TIME // ranges), dim=1):
        places = (part - left).mul_(float(bins)).div_(width).clamp_(0, bins - 1)
        places = torch.where(part.isnan(), bins, places).to(torch.int64).add_(first)
        counts += torch.bincount(places.flatten(), minlength=len(counts))
    return counts.view(ranges, bins + 1)[:, :bins].to(torch.float32)


def quantization_noise(
    counts: Tensor, centers: Tensor, scales: Tensor, offsets: Tensor, steps: int, gamma: float
) -> Tensor:
    """Return the error of quantizing histograms to each of the grids, [ranges, grids]: see ``calibration.cpp``."""
    if counts.is_cpu:
        return torch.ops.lightning_quant.quantization_noise(counts, centers, scales, offsets, steps, gamma)
    return noise_of_all_grids(counts, centers, scales, offsets, steps, gamma)


def noise_of_all_grids(
    counts: Tensor, centers: Tensor, scales: Tensor, offsets: Tensor, steps: int, gamma: float
) -> Tensor:
    """Compute :func:`quantization_noise` in PyTorch's own operations."""
    at_a_time = max(1, _AT_A_TIME // (counts.shape[1] * scales.shape[1]))
    parts = []
    for count, center, scale, offset in zip(
        *(one.split(at_a_time) for one in (counts, centers, scales, offsets)), strict=True
    ):
        scale, offset, center, count = scale[:, :, None], offset[:, :, None], center[:, None], count[:, None]
        exact = torch.round(center / scale - offset)
        clipped = exact.clamp(0, steps)
        errors = ((clipped + offset) * scale - center).square() * count
        parts.append(torch.where(clipped == exact, errors, errors * gamma).sum(dim=2))
    return torch.cat(parts)


def _range(tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each channel, in the shape of the ranges."""
    missing = tensor.dim() - len(shape)
    axes = [axis for axis in range(tensor.dim()) if axis < missing or shape[axis - missing] == 1]
    if len(axes) == tensor.dim():
        low, high = tensor.aminmax()
        return low.view(shape), high.view(shape)
    return tensor.amin(axes).view(shape), tensor.amax(axes).view(shape)
