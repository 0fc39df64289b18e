"""Modules for functions that AIMET has none for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.simulation.callsites.aimet_views import LayoutBase
from lightning_quant.simulation.callsites.functions import AUGMENTED, in_place
from lightning_quant.simulation.callsites.rules.base import Named


class Generic(Named):
    """A module made for the function, if AIMET has none: nothing stays in float for lack of an entry in the table."""

    def __init__(self) -> None:
        super().__init__("")

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        function = func
        if in_place(func, name):  # out of place, as every module computes
            plain = AUGMENTED.get(name, name)
            function = getattr(torch.Tensor, plain, None)
            if function is None:
                return None
        return generic_class(name, function)()


@functools.cache
def generic_class(name: str, function: Any) -> type[nn.Module]:
    """Return the module class for a function that AIMET has none for, and register it with AIMET."""
    from lightning_quant.simulation.aimet import QuantizationMixin, create_wrapper_module

    plain: Any = create_wrapper_module("".join(part.title() for part in name.split("_")), function)
    plain.__module__ = __name__

    class Quantized(LayoutBase, QuantizationMixin, plain):
        """The function, its inputs and output quantized."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args = tuple(
                quantizer(value) if quantizer is not None and _is_float(value) else value
                for value, quantizer in _paired(args, self.input_quantizers)
            )
            output = super(QuantizationMixin, self).forward(*args, **kwargs)
            quantizer = self.output_quantizers[0]
            return quantizer(output) if quantizer is not None and _is_float(output) else output

    Quantized.__name__ = Quantized.__qualname__ = f"Quantized{plain.__name__}"
    Quantized.made_by = (_quantized_generic, name, function)
    QuantizationMixin.implements(plain)(Quantized)
    return plain


def _quantized_generic(name: str, function: Any) -> Any:
    from lightning_quant.simulation.aimet import QuantizationMixin

    return QuantizationMixin.cls_to_qcls[generic_class(name, function)]


def _paired(args: Sequence[Any], quantizers: Sequence[Any]) -> list[tuple[Any, Any]]:
    known = list(quantizers)
    return [(value, known[index] if index < len(known) else None) for index, value in enumerate(args)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
