"""The product of a mask with a number that stands for infinity, a smaller one than the network's code has.

``(1 - mask) * torch.finfo(dtype).min``, which is added to scores: the file has no grid for such a product, and the NPU
does not add numbers of such unlike sizes.

Importing this module imports AIMET.
"""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import override

from lightning_quant.simulation.aimet import custom
from lightning_quant.simulation.callsites.attributes import INFINITE, MASKED_FACTOR


class MaskedMultiply(custom.QuantizedMultiply):
    """A product whose number, where it stands for infinity, is as large as a softmax needs it; not in calibration."""

    @override
    def forward(self, x: Any, y: Any) -> Any:
        factor = vars(self).get(MASKED_FACTOR)
        if factor is not None and isinstance(y, int | float) and abs(y) >= INFINITE:
            y = math.copysign(factor, y)
        return super().forward(x, y)
