"""Division and square root where rounding produced a zero.

Eight bits hold nothing between zero and 1/255 of the largest value. A length or a variance that is small compared to
others becomes zero, what is divided by it infinite, and a network that trained without trouble no longer trains.

Importing this module imports AIMET.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_quant.simulation.aimet import custom
from lightning_quant.simulation.callsites.traces import tracing_state


class SafeDivide(custom.QuantizedDivide):
    """A division by at least one step of the grid that its divisor was rounded to, where no divisor is negative.

    The second input quantizer is the one that the divisor was rounded by.
    """

    @override
    def forward(self, x: Any, y: Any) -> Any:
        quantizer = self.input_quantizers[1]
        if quantizer is not None and isinstance(y, Tensor) and quantizer.is_initialized():
            with torch.no_grad():
                step, is_signed = quantizer.get_scale().max().to(y.dtype), quantizer.get_min().min() < 0
            if tracing_state() is None:
                y = torch.where(is_signed, y, torch.maximum(y, step))  # the numbers stay on the device
            elif not is_signed:  # in a file Max: a Clip of one limit is not safe with the NPU
                y = torch.maximum(y, y.new_tensor(float(step)))
        return super().forward(x, y)


class SafeSqrt(custom.QuantizedSqrt):
    """A square root without a slope at zero, where the true one is infinite: as ``torch.norm`` has it."""

    @override
    def forward(self, x: Any) -> Any:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        zero = x == 0
        return super().forward(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
