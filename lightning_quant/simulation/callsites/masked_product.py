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
from lightning_quant.simulation.callsites.attributes import INFINITE, IS_CALIBRATED, MASKED, MASKED_FACTOR


class MaskedMultiply(custom.QuantizedMultiply):
    """A product whose number, where it stands for infinity, is as large as a softmax needs it.

    In calibration it is larger, so that what is masked is seen as such; and where the tensor is no mask of 0, 1 or -1,
    the number is a factor, and stays from then on.
    """

    @override
    def forward(self, x: Any, y: Any) -> Any:
        factor = vars(self).get(MASKED_FACTOR)
        if factor is not None and isinstance(y, int | float) and abs(y) >= INFINITE:
            if vars(self).get(IS_CALIBRATED) and not bool(((x == 0) | (x.abs() == 1)).all()):
                self.__dict__.pop(MASKED_FACTOR)
            else:
                y = math.copysign(MASKED if vars(self).get(IS_CALIBRATED) else factor, y)
        return super().forward(x, y)
