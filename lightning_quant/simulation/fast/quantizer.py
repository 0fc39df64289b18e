"""AIMET's quantizer on a short path: scale, offset and fake quantization in one kernel."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.aimet import (
    AffineEncoding,
    StatisticsNotFoundError,
    _flag_extreme_min_max,
    _get_minimum_scale,
    _MinMaxObserver,
    _MinMaxRange,
)
from lightning_quant.simulation.callsites.passes import running_pass
from lightning_quant.simulation.callsites.traces import traced
from lightning_quant.simulation.fast import gpu, in_graphs, kernels
from lightning_quant.simulation.fast.kernels import Activation
from lightning_quant.simulation.symmetric_conversion import symmetric_ends


class FastQuantizer:
    """A quantizer that computes with a kernel; what none is for, it leaves to AIMET.

    It is a collection of methods for a subclass of AIMET's own class, named ``aimet_class``: see ``short_path.py``.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        """Fake-quantize a tensor."""
        fused = self.after(input)
        return self.aimet_class.forward(self, input) if fused is None else fused

    def after(
        self: Any, input: Tensor, activation: Activation = Activation.NONE, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """Fake-quantize ``activation(input)``; ``None`` where AIMET has to.

        On a GPU the result can be asked for in another ``dtype``, for an operation that would round it to that anyway.
        """
        parameters = self._parameters
        low, high = parameters.get("min"), parameters.get("max")
        if (
            low is None
            or high is None
            or low.dtype is not torch.float32
            or self.block_size is not None
            or self.zero_point_shift
            or not (in_graphs.is_calibrated(self) if in_graphs.is_tracing() else _has_kernel(input, activation))
            or is_traced()
            or not is_known(self, low, high)
        ):
            return None
        low, high = self.ends(low, high)
        qmin, qmax = self.qmin, self.qmax
        grid = (low, high, qmin, qmax, self._symmetric, smallest_scale(qmax - qmin), activation)
        if in_graphs.is_tracing():
            return in_graphs.fake_quantize(input, *grid)
        if type(input) is not Tensor:
            input = input.as_subclass(Tensor)
        if input.is_cpu:
            return torch.ops.lightning_quant.fake_quantize(input, *grid)
        return gpu.fake_quantize(input, *grid, dtype) if qmax - qmin <= gpu.MOST_STEPS else None

    def ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends of the grid's range, of those that are kept."""
        return low, high

    @contextlib.contextmanager
    def _compute_encodings(self: Any, passthrough: bool = False) -> Iterator[None]:
        """Observe the inputs, without AIMET's search for the best range of every batch, which it discards."""
        parameters = self._parameters
        if not (
            passthrough and self.is_overwrite_allowed() and {"min", "max"} == parameters.keys() and not self.block_size
        ):
            with self.aimet_class._compute_encodings(self, passthrough):
                yield
            return
        analyzer, steps = self.encoding_analyzer, self.qmax - self.qmin
        if self.zero_point_shift == 0.5:
            steps -= 1
        low = parameters["min"]
        # AIMET's protection against overflow reads where a tensor comes from
        encoding = AffineEncoding(
            torch.ones_like(low.detach()), torch.zeros_like(low.detach()), self.qmin, self.qmax, producer=self
        )

        def observe(input: Tensor) -> Tensor:
            seen = input.as_subclass(Tensor).detach()
            if seen.numel():
                _observe(analyzer, seen)
            seen.encoding = encoding  # type: ignore[attr-defined]
            return seen

        analyzer.reset_stats()
        self.forward = observe
        try:
            yield
        finally:
            del self.forward
        try:
            ends = analyzer.compute_encodings(steps, self.symmetric)
        except StatisticsNotFoundError:
            return
        _flag_extreme_min_max(*ends)
        self.set_range(
            *(end if self.is_overwrite_allowed(name) else None for name, end in zip(("min", "max"), ends, strict=True))
        )


class FastConversion(FastQuantizer):
    """The conversion to a symmetric grid."""

    def ends(self: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends of the grid's range, of those of what is converted."""
        return symmetric_ends(low, high) if self._symmetric else (low, high)


@torch.no_grad()
def _observe(analyzer: Any, tensor: Tensor) -> None:
    observer = analyzer.observer
    if isinstance(observer, _MinMaxObserver) and math.prod(observer.shape) == 1:
        low, high = tensor.aminmax()  # AIMET reads the tensor once for each
        observer.merge_stats(_MinMaxRange(low.view(observer.shape), high.view(observer.shape)))
    else:
        analyzer.update_stats(tensor)


def _has_kernel(input: Tensor, activation: Activation) -> bool:
    if input.is_cpu:
        return input.dtype is torch.float32 and activation is not Activation.SILU and kernels.unavailable() is None
    return input.is_cuda and input.dtype in gpu.TYPES and gpu.unavailable() is None


def is_traced() -> bool:
    """Return whether what runs now is recorded by something else than our own compilation."""
    if in_graphs.is_tracing():
        return False
    running = running_pass()
    return traced() if running is None else running.is_traced


def is_known(quantizer: Any, low: Tensor, high: Tensor) -> bool:
    """Return whether a quantizer's range was set; AIMET's own ``is_initialized`` takes ten times as long."""
    initial = quantizer._initial_parameters
    for name, end in (("min", low), ("max", high)):
        first = initial.get(name)  # a reference to what is replaced or written to when the range is set
        if first is not None and first[0]() is end and end._version == first[1]:
            return False
    return True


def is_fast(module: Any) -> bool:
    """Return whether a module is on the short path."""
    return "aimet_class" in vars(type(module))


smallest_scale = functools.cache(_get_minimum_scale)
