"""How values lie on the grid that they are rounded to, and what is wrong with the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.deploy.blame.reasons import Cause, Reason
from lightning_quant.simulation.aimet import Quantizer

# An outlier is this many times as large as what three quarters of the channels reach: two bits of the grid are its own.
_OUTLIER = 4.0
# Share of the channels that can be outliers.
_FEW = 0.25
# Almost all values, and the share of the range that they use where it is too wide: three bits are lost.
_ALMOST_ALL, _WIDE = 0.999, 1 / 8
# A quantile is taken of so many values at most.
_LOOKED_AT = 20_000


class GridUse:
    """Collects how the values of one tensor lie on a grid.

    Args:
        quantizer: rounds it, calibrated.
        axis: that of the channels, in a tensor of more than one axis.
        parameter: its name, if it is one.
    """

    def __init__(self, quantizer: Quantizer, axis: int, parameter: str = "") -> None:
        self.quantizer, self.axis, self.parameter = quantizer, axis, parameter
        self._scale, self._offset = (value.detach() for value in (quantizer.get_scale(), quantizer.get_offset()))
        lowest, highest = (self._scale * (self._offset + end) for end in (quantizer.qmin, quantizer.qmax))
        self._reach = float(torch.maximum(lowest.abs(), highest.abs()).max())
        self._clipping = self._rounding = self._signal = 0.0
        self._count = self._clipped = 0
        self._channels: Tensor | None = None
        self._most = 0.0

    @property
    def noise_share(self) -> float:
        """Power of what is lost, as a share of the power of the values."""
        return (self._clipping + self._rounding) / self._signal if self._signal else 0.0

    def add(self, values: Tensor) -> None:
        """Add one tensor of values before rounding."""
        values = finite(values.detach().as_subclass(Tensor))
        places = values / self._scale - self._offset
        inside = places.clamp(self.quantizer.qmin, self.quantizer.qmax)
        self._clipping += _power((places - inside) * self._scale)
        self._rounding += _power((inside.round() - inside) * self._scale)
        self._clipped += int(((places - inside).abs() > 0.5).sum())
        self._count += values.numel()
        size = values.abs()
        self._signal += _power(size)
        if values.dim() > 1:
            channels = size.transpose(0, self.axis).flatten(1).amax(1)
            self._channels = channels if self._channels is None else torch.maximum(self._channels, channels)
        used = size[size > 0]
        used = used[:: max(1, used.numel() // _LOOKED_AT)]
        if used.numel():
            self._most = max(self._most, float(torch.quantile(used.float(), _ALMOST_ALL)))

    def reason(self) -> Reason:
        """Return what costs most: values that are clipped, an outlier, a range too wide, or too few bits."""
        if self._clipping > self._rounding:
            return Reason(Cause.CLIPPED, self.parameter, share=self._clipped / max(self._count, 1))
        channels = self._channels
        if channels is not None and self._scale.numel() == 1 and channels.numel() > 1:
            outliers = channels > _OUTLIER * torch.quantile(channels, 1 - _FEW)
            if 0 < int(outliers.sum()) <= _FEW * channels.numel():
                share = float(channels[~outliers].max()) / self._reach
                return Reason(
                    Cause.OUTLIER_CHANNEL,
                    self.parameter,
                    share=share,
                    channels=tuple(outliers.nonzero().flatten().tolist()),
                )
        if self._scale.numel() == 1 and self._most < _WIDE * self._reach:
            return Reason(Cause.TOO_WIDE, self.parameter, share=self._most / self._reach)
        return Reason(Cause.COARSE_GRID, self.parameter, found=self.quantizer.bitwidth)


def finite(values: Tensor) -> Tensor:
    """Return values with zero for those that are NaN or infinite, such as masked scores."""
    if bool(values.sum().isfinite()):  # looking at each is slow
        return values
    return torch.where(values.isfinite(), values, 0.0)


def _power(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
