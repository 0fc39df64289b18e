"""The one door to AIMET: no other file imports it. Loaded late, kept quiet, with its failures named.

Importing AIMET takes seconds, adds warning filters, puts a handler on the root logger and makes its own loggers print
to stdout. So everything that is used of it is listed here by name, and is loaded when the name is first read:
``aimet.QuantizerBase`` after ``from lightning_quant.simulation import aimet``. A file that derives classes from
AIMET's imports the names themselves, and is imported late in turn.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from lightning_quant.errors import LightningQuantError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What is used of AIMET, by the module that has it: what to look at when AIMET's version changes.
_USED = {
    "aimet_torch": ("QuantizationSimModel",),
    "aimet_torch._base.nn.modules.custom": ("create_wrapper_module",),
    "aimet_torch.adaround.adaround_weight": ("Adaround", "AdaroundParameters"),
    "aimet_torch.batch_norm_fold": ("fold_all_batch_norms",),
    "aimet_torch.common.defs": ("QuantScheme",),
    "aimet_torch.common.onnx": ("_utils",),
    "aimet_torch.common.onnx._utils": ("_is_grid_equivariant_op", "_is_htp_interpolation_op"),
    "aimet_torch.common.quantsim": ("_get_minimum_scale",),
    "aimet_torch.cross_layer_equalization": ("CrossLayerScaling", "GraphSearchUtils"),
    "aimet_torch.meta": ("connectedgraph",),
    "aimet_torch.nn": ("BaseQuantizationMixin", "QuantizationMixin"),
    "aimet_torch.nn.modules": ("custom",),
    "aimet_torch.nn.true_quant": ("_DispatchMixin",),
    "aimet_torch.onnx": ("_remove_dangling_nodes_and_initializers", "export"),
    "aimet_torch.onnx_utils": ("map_torch_types_to_onnx",),
    "aimet_torch.quantization.affine": ("AffineEncoding", "QuantizeDequantize"),
    "aimet_torch.quantization.base": ("QuantizerBase",),
    "aimet_torch.quantization.encoding_analyzer": (
        "MinMaxEncodingAnalyzer",
        "PercentileEncodingAnalyzer",
        "TfEnhancedEncodingAnalyzer",
        "_Histogram",
        "_HistogramObserver",
        "_MinMaxObserver",
        "_MinMaxRange",
        "_flag_extreme_min_max",
        "adjust_min_max",
    ),
    "aimet_torch.quantization.tensor": ("QuantizedTensorBase",),
    "aimet_torch.seq_mse": ("apply_seq_mse",),
    "aimet_torch.utils": ("StatisticsNotFoundError", "remove_activation_quantizers", "remove_all_quantizers"),
}
_HOMES = {name: home for home, names in _USED.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    with _program_unchanged():
        value = pkgutil.resolve_name(f"{_HOMES[name]}.{name}")
    globals()[name] = value
    return value


@functools.cache
def load() -> ModuleType:
    """Import ``aimet_torch`` and return it.

    A program that had imported AIMET itself before keeps its logging as it set it up. Otherwise AIMET's
    loggers stay silent below WARNING and hand the rest to the standard ``logging`` configuration.
    """
    if "aimet_torch" in sys.modules:
        return sys.modules["aimet_torch"]
    with _program_unchanged():
        import aimet_torch
        from aimet_torch.common.utils import AimetLogger

        for area in AimetLogger.LogAreas:
            logger = AimetLogger.get_area_logger(area)
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.WARNING)
    return aimet_torch


@contextlib.contextmanager
def _program_unchanged() -> Iterator[None]:
    """Keep the root logger, the warning filters and standard output as they are while a module is imported."""
    root = logging.getLogger()
    handlers, level, filters = list(root.handlers), root.level, list(warnings.filters)
    try:
        root.setLevel(logging.WARNING)  # AIMET greets at INFO
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        warnings.filters[:] = filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]  # invalidates the per-module caches


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn whatever AIMET raises in a block (RuntimeError, KeyError, AssertionError …) into this package's error.

    Raises:
        LightningQuantError: named after ``what`` was being done.
    """
    try:
        yield
    except LightningQuantError:
        raise
    except Exception as error:
        raise LightningQuantError(f"AIMET failed in {what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load AIMET and, for the length of a block, hide the warnings it causes in PyTorch and cannot help."""
    load()
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.jit\..* is deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Exporting to ONNX opset version")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield


@contextlib.contextmanager
def export_mended() -> Iterator[None]:
    """Mend two faults of AIMET's exporter for the length of a block.

    - It looks for the axes of a minimum in an input, where ONNX has them since opset 18 only.
    - It rounds constants with the zero point added, which decides ties the other way where that is odd. QuantizeLinear
      and the simulation add it to the rounded value.
    """
    import numpy as np

    utils = __getattr__("_utils")
    originals = {name: getattr(utils, name) for name in ("_is_htp_masked_softmax_reducemin", "_quantize_const")}

    def is_in_masked_softmax(node: Any, *given: Any, **named: Any) -> bool:
        original = originals["_is_htp_masked_softmax_reducemin"]
        return len(node.input) > 1 and original(node, *given, **named)

    def quantize_const(
        const: Any, name: str, scale: Any, zero_point: Any, axis: Any, block_size: Any, output_dtype: str,
        per_block_int_scale: Any, opset: Any,
    ) -> Any:  # fmt: skip
        given = (axis, block_size, output_dtype, per_block_int_scale, opset)
        if zero_point is None or not output_dtype.startswith("uint") or per_block_int_scale is not None:
            return originals["_quantize_const"](const, name, scale, zero_point, *given)
        values = utils.to_array_ir(const).astype(np.float32)
        scale, zero_point = (
            utils._broadcast(one, values.ndim, axis=axis, block_size=block_size)
            for one in (scale.astype(np.float32), zero_point)
        )
        last = 2 ** int(output_dtype.removeprefix("uint")) - 1
        integers = (np.rint(values / scale) + zero_point).clip(0, last)
        return opset.DequantizeLinear.make_arr(integers, dtype=output_dtype, name=name)

    utils._is_htp_masked_softmax_reducemin, utils._quantize_const = is_in_masked_softmax, quantize_const
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(utils, name, original)


class Quantizer(Protocol):
    """Rounds one tensor to its grid of integers: what is used of AIMET's ``AffineQuantizerBase``, a module.

    The range and what follows from it are ``None`` before calibration; ask :meth:`is_initialized` where that can be.

    Attributes:
        shape: ``()`` per tensor, ``(C, 1, 1, 1)`` and the like per channel.
        bitwidth: bits of an integer.
        symmetric: whether zero is in the middle of the grid.
        qmin: smallest integer.
        qmax: largest integer.
        encoding_analyzer: observes values during calibration and computes the range from them.
    """

    shape: tuple[int, ...]
    bitwidth: int
    symmetric: bool
    qmin: int
    qmax: int
    encoding_analyzer: Any

    def __call__(self, input: Tensor) -> Tensor:
        """Round ``input``."""

    def is_initialized(self) -> bool:
        """Return whether it has a range."""

    def get_min(self) -> Tensor:
        """Return the lower end of the range, in units of the tensor."""

    def get_max(self) -> Tensor:
        """Return the upper end of the range."""

    def get_scale(self) -> Tensor:
        """Return the distance between two neighboring integers, in units of the tensor."""

    def get_offset(self) -> Tensor:
        """Return the integer that is added so that zero is an integer."""

    def compute_encodings(self) -> contextlib.AbstractContextManager[None]:
        """Observe what is rounded in a block, and set the range from it at its end."""

    def allow_overwrite(self, mode: bool) -> None:
        """Let calibration set the range, or keep it."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the ends of the range."""

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        """Call ``hook`` after each rounding."""


class QuantizedLayer(Protocol):
    """A layer whose tensors are rounded: what AIMET's ``BaseQuantizationMixin`` adds to the layer's own class.

    Attributes:
        param_quantizers: by the parameter's name; ``None`` where it stays in float.
        input_quantizers: one for each input, ``None`` where it was rounded before.
        output_quantizers: one for each output.
    """

    param_quantizers: MutableMapping[str, Quantizer | None]
    input_quantizers: MutableSequence[Quantizer | None]
    output_quantizers: MutableSequence[Quantizer | None]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer's own class."""


class Product(Protocol):
    """A tensor in AIMET's graph: what is used of its ``Product``."""

    shape: Any
    is_parm: bool
    is_model_input: bool
    producer: Operation | None


class Operation(Protocol):
    """An operation in AIMET's graph: what is used of its ``Op``."""

    type: str
    inputs: list[Product]
    output_ops: list[Operation]

    def get_module(self) -> Any:
        """Return the layer that computes it, or ``None``."""

    def is_grid_preserving_op(self) -> bool:
        """Return whether its output has the values of its input: a reshape, a slice."""


class Graph(Protocol):
    """AIMET's ``ConnectedGraph`` of a network."""

    ordered_ops: list[Operation]

    def get_all_ops(self) -> dict[str, Operation]:
        """Return the operations by name."""

    def is_safe(self) -> bool:
        """Return whether the graph covers the whole network."""


class Simulation(Protocol):
    """A network with quantizers in it: what is used of AIMET's ``QuantizationSimModel``.

    Attributes:
        model: the network, whose layers are quantized.
        connected_graph: its graph; ``None`` in copies of ours.
        onnx: writes ONNX files.
    """

    model: nn.Module
    connected_graph: Graph | None
    onnx: Any
    _onnx_exporter: Any
    _hw_version: str | None

    def compute_encodings(self, forward_pass_callback: Callable[[nn.Module], object]) -> None:
        """Set the range of every quantizer from what the callback runs through :attr:`model`."""

    def quantizers(self) -> Iterator[Quantizer]:
        """Return all quantizers."""

    def set_percentile_value(self, percentile_value: float) -> None:
        """Set where the ranges of percentile analyzers end, 50 to 100."""

    def _get_qmodule(self, op: Operation) -> Any:
        """Return the quantized layer of an operation of the graph, or ``None``."""
