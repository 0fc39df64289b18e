"""A network that was quantized in place, and what is known of it."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.traces import functions_inlined, tracing_state
from lightning_quant.simulation.callsites.watching import watched_class
from lightning_quant.simulation.conversions import convert_where_needed, converting_at, converts, fit_grids
from lightning_quant.simulation.dataflow import Dataflow, quantizer_at
from lightning_quant.simulation.fixed_ranges import fixed_range, set_fixed_ranges
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in, with_tensors
from lightning_quant.simulation.manifest import Manifest
from lightning_quant.simulation.preflight import Finding
from lightning_quant.simulation.range_estimators import RangeEstimator
from lightning_quant.simulation.stored_ranges import check_stored_ranges
from lightning_quant.utilities.hashing import add_tensor
from lightning_quant.utilities.parsing import short_repr
from lightning_quant.utilities.registry import Spec

_MOST_BITS = 32


class FlatNetwork(nn.Module):
    """A network seen as tensors in, tensors out: the only form that AIMET and ONNX trace.

    Args:
        network: the network itself, with any structure of inputs and outputs.
        inputs: an example call; the flat tensors go where its tensors are.
    """

    def __init__(self, network: nn.Module, inputs: NetworkInputs) -> None:
        super().__init__()
        self.network = network
        # Only the structure is needed: empty tensors of the same rank mark the places.
        self._structure = inputs.map(lambda tensor: tensor.new_empty((0,) * tensor.dim()))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the network on the flat ``tensors`` and return every tensor of its output, in order."""
        args, kwargs = with_tensors((self._structure.args, self._structure.kwargs), tensors)
        with functions_inlined() if tracing_state() is not None else nullcontext():
            return tuple(tensors_in(self.network(*args, **kwargs)))


class QuantizedNetwork:
    """What is known of a network whose weights and activations are rounded to the integers of the device.

    The network itself stays the user's object: its class, methods, attributes, hooks and names of weights are what
    they were, with ranges added. This object is kept with it; :meth:`of` finds it. What the network does not have
    itself (``self.model.findings``) is looked up here, and what this does not have, there. The network's ``state_dict``
    carries a manifest, so a checkpoint knows how it was quantized and refuses to be loaded into something else.

    Attributes:
        network: the user's network, its layers replaced by AIMET's quantized ones.
        recipe: how it was quantized.
        inputs: an example call, of one sample.
        others: calls of other structure.
        findings: what the preflight found (see :mod:`lightning_quant.simulation.preflight`).
        calibrated: whether the ranges of the activations are known. Restored with the weights, and the
            only thing to ask: AIMET's own ``is_initialized()`` turns true under DDP without calibration.
        left_in_float: operations that no example of the network came to and calibration did, by module.
        promoted: layers that were given a finer precision than the recipe says, to win accuracy back.
        range_estimator: how ranges are calibrated, see :meth:`set_range_estimator`.
        equalized: whether scale was shifted between channels, so that layers output other numbers than in float.
        float_class: class of the float network.
        float_sha256: identifies the weights of the float network it was made of.
        dataflow: what rounds the input of each layer, and which layers share one bit width.
        sim: AIMET's ``QuantizationSimModel`` around it, for everything AIMET can do with one.
    """

    def __init__(
        self,
        network: nn.Module,
        sim: aimet.Simulation,
        recipe: QuantRecipe,
        inputs: NetworkInputs,
        output: Any,
        findings: list[Finding],
        float_network: nn.Module,
        others: Sequence[NetworkInputs] = (),
    ) -> None:
        self.network = network
        self.sim = sim
        self.recipe = recipe
        self.inputs = inputs
        self.others = list(others)
        self.findings = findings
        self.calibrated = False
        self.promoted: dict[str, Precision] = {}
        self.range_estimator = recipe.range_estimator
        self.equalized = False
        self.dataflow = Dataflow.of(sim, network)
        self.left_in_float: dict[str, list[str]] = {}
        self._bitwidths: dict[str, int] = {}
        ranges = {id(parameter) for parameter in self.range_parameters() if parameter.requires_grad}
        self._learnable_ranges = {name for name, value in network.named_parameters() if id(value) in ranges}
        self._output = apply_to_collection(output, Tensor, lambda t: torch.empty_like(t, device="meta"))
        self.float_class = type(float_network)
        self.float_sha256: str | None = _weights_hash(float_network)
        self._float = (float_network, self.float_sha256)
        own: Any = self.float_class
        network.__class__ = watched_class(own, _Quantized)
        network.__dict__[_STATE] = self
        network.register_load_state_dict_pre_hook(_check_before_loading)
        network.register_load_state_dict_post_hook(_fix_ranges)

    @classmethod
    def of(cls, module: Any) -> QuantizedNetwork | None:
        """Return what is known of a network; ``None`` if it is not quantized."""
        if isinstance(module, cls):
            return module
        return vars(module).get(_STATE) if isinstance(module, nn.Module) else None

    @classmethod
    def named_in(cls, module: nn.Module) -> Iterator[tuple[str, QuantizedNetwork]]:
        """Yield the quantized networks among the modules of ``module``, with their dotted names."""
        for name, one in module.named_modules():
            if (known := cls.of(one)) is not None:
                yield name, known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Put the network into training mode."""
        self.network.train(mode)
        return self

    def eval(self) -> QuantizedNetwork:
        """Put the network into eval mode."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "network" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.network, name)

    def __getstate__(self) -> dict[str, Any]:
        # AIMET's graph of the network holds a local class, which no pickle takes, and is a chain deeper than
        # Python's recursion limit. Only building needs it: copies go without.
        sim = copy.copy(self.sim)
        sim.connected_graph = None
        sim._onnx_exporter = type(sim.onnx)(sim)
        return {**self.__dict__, "sim": sim, "_float": (None, None)}

    @property
    def float_network(self) -> nn.Module | None:
        """A copy of the float network, as it was; ``None`` where there is none.

        A checkpoint does not hold it: what :func:`~lightning_quant.load_quantized` builds has none.
        """
        network, digest = self._float
        return network if digest == self.float_sha256 else None

    @property
    def output_structure(self) -> Any:
        """The structure of the network's output for one sample, its tensors on the meta device."""
        return self._output

    @property
    def has_fine_grids(self) -> bool:
        """Whether a quantizer has more than 8 bits: a grid with more values than 16-bit floats or TF32 tell apart."""
        return any(quantizer.bitwidth > 8 for quantizer in self.quantizers())

    def range_parameters(self) -> list[nn.Parameter]:
        """Return the learnable ends (min, max) of all quantization ranges."""
        found = (parameter for quantizer in self.quantizers() for parameter in quantizer.parameters())
        return list(dict.fromkeys(found))  # a conversion has the range of what it converts

    def quantizers(self) -> Iterator[aimet.Quantizer]:
        """Return AIMET's quantizers of weights and activations; the objects stay the same, whatever bits they get."""
        return (module for module in self.network.modules() if isinstance(module, aimet.QuantizerBase))

    def cached_weights(self) -> AbstractContextManager[None]:
        """Quantize every weight once for the length of a block, in which no gradient is computed.

        Weights that change in it are quantized again; for those that are written to through ``.data``, see
        :func:`~lightning_quant.simulation.fast.layers.cached_weights`.
        """
        from lightning_quant.simulation.fast.layers import cached_weights

        return cached_weights(self.network)

    def learn_ranges(self, learn: bool) -> None:
        """Let training change the ranges, or keep them as they are. Ends pinned by the hardware stay pinned."""
        fixed = {id(end) for one in self.quantizers() if fixed_range(one) is not None for end in one.parameters()}
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if name in self._learnable_ranges:
                parameter.requires_grad_(learn and id(parameter) not in fixed)

    def manifest(self) -> Manifest:
        """Return how this network was quantized."""
        return Manifest(
            **Manifest.versions(),
            precision=self.recipe.precision,
            hardware=self.recipe.identity()["hardware"],
            overrides=self.recipe.overrides,
            range_estimator=self.range_estimator.spec,
            calibrated=self.calibrated,
            float_sha256=self.float_sha256,
            equalized=self.equalized,
            promoted=self.promoted,
            inputs=self.inputs.describe(),
            other_inputs=[other.describe() for other in self.others],
        )

    def take_over(self, state: Any) -> None:
        """Check a stored manifest against this network, then adopt what it says of the ranges.

        Raises:
            CheckpointError: naming the first entry that disagrees, with both values.
        """
        manifest = Manifest.of_checkpoint(state)
        stored = manifest.to_dict()
        for name, expected in self.recipe.identity().items():
            if stored[name] != expected:
                raise CheckpointError(
                    f"The checkpoint was quantized with {name}={stored[name]!r}, but the callback was given "
                    f"{name}={expected!r}. Give the callback {name}={stored[name]!r}, or start from the "
                    f"float weights to quantize with {expected!r}."
                )
        self.set_range_estimator(self._stored_estimator(manifest.range_estimator))
        self.calibrated = manifest.calibrated
        self.float_sha256 = manifest.float_sha256
        self.equalized = manifest.equalized
        # the bit widths themselves come with AIMET's state of each quantizer
        self.promoted = dict(manifest.promoted)

    def _stored_estimator(self, spec: Spec) -> RangeEstimator:
        """Return the estimator of a checkpoint, which may be one that this network was given as an instance."""
        for known in (self.range_estimator, self.recipe.range_estimator):
            if known.spec == spec:
                return known
        return RangeEstimator.of_checkpoint(spec)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of everything that quantization and training change: weights, ranges, bit widths."""
        return {name: _copied(value) for name, value in self.network.state_dict().items()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a :meth:`snapshot` bit for bit; the parameters stay the same objects."""
        # AIMET takes apart the extra state that it is given
        state: Any = OrderedDict((name, _copied(v) if isinstance(v, dict) else v) for name, v in snapshot.items())
        # without versions modules take it for the state of older ones, and convert it
        state._metadata = {name: {"version": module._version} for name, module in self.network.named_modules()}
        self.network.load_state_dict(state)

    def remember_bitwidths(self) -> None:
        """Remember the bit widths as those of the recipe, for :meth:`reset_to` to restore."""
        modules = self.network.named_modules()
        self._bitwidths = {
            name: module.bitwidth
            for name, module in modules
            if isinstance(module, aimet.QuantizerBase) and not converts(module)
        }

    def reset_to(self, network: nn.Module) -> None:
        """Go back to float weights that were never calibrated: weights, bit widths and range estimator.

        Args:
            network: what :func:`~lightning_quant.simulation.prepare.prepare` made of the same network, or that
                network with other weights.
        """
        mine = self.network.state_dict()
        with torch.no_grad():
            for name, value in network.state_dict().items():
                if isinstance(value, Tensor):
                    mine[name].copy_(value)
        for name, bits in self._bitwidths.items():
            self.network.get_submodule(name).bitwidth = bits  # type: ignore[assignment]
        fit_grids(self.network, self.dataflow)
        self.promoted = {}
        self.equalized = False
        self.set_range_estimator(self.recipe.range_estimator)

    def set_range_estimator(self, estimator: RangeEstimator) -> None:
        """Calibrate with another range estimator from now on."""
        if estimator != self.range_estimator:
            set_range_estimator(self.network, estimator)
            self.range_estimator = estimator


_STATE = "_quantized"


class _Quantized:
    """What the class of a quantized network has in addition to the user's own."""

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return type(self).watched.__getattr__(self, name)
        except AttributeError:
            known = self.__dict__.get(_STATE)
            if known is None or name.startswith("_") or not (name in vars(known) or hasattr(QuantizedNetwork, name)):
                raise
            return getattr(known, name)

    def get_extra_state(self: Any) -> Any:
        """Return the manifest; :meth:`torch.nn.Module.state_dict` stores it with the weights."""
        if torch.onnx.is_in_onnx_export():  # which takes every state for a tensor, as AIMET's quantizers know too
            return torch.empty(0)
        own = type(self).watched.get_extra_state
        manifest: dict[str, Any] = self.__dict__[_STATE].manifest().to_dict()
        return manifest if own is nn.Module.get_extra_state else {**manifest, _OF_THE_NETWORK: own(self)}

    def set_extra_state(self: Any, state: Any) -> None:
        """Check the manifest and adopt it."""
        self.__dict__[_STATE].take_over(state)
        if isinstance(state, dict) and _OF_THE_NETWORK in state:
            type(self).watched.set_extra_state(self, state[_OF_THE_NETWORK])


# In the manifest, where the network's own class keeps a state of its own.
_OF_THE_NETWORK = "of_the_network"


def _weights_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            add_tensor(digest, name, value)
    return digest.hexdigest()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def set_range_estimator(network: nn.Module, estimator: RangeEstimator) -> None:
    """Let every quantizer of a network observe for, and compute its range by, ``estimator``."""
    module: Any
    for module in network.modules():
        if hasattr(module, "encoding_analyzer"):
            observer = module.encoding_analyzer.observer
            module.encoding_analyzer = estimator.analyzer(observer.shape, observer.block_size)


def check_ranges(network: QuantizedNetwork) -> None:
    """Refuse ranges and grids that no calibration and no training leaves.

    Raises:
        CheckpointError: naming the quantizer.
    """
    for name, module in network.network.named_modules():
        ends = dict(module.named_parameters(recurse=False))
        low, high = getattr(module, "qmin", 0), getattr(module, "qmax", 1)
        if not low < high < low + 2**_MOST_BITS or getattr(module, "block_size", None) is not None:
            raise CheckpointError(
                f"The grid of {name!r} reaches from {short_repr(low)} to {short_repr(high)} in blocks of "
                f"{short_repr(getattr(module, 'block_size', None))}: expected at most {_MOST_BITS} bits and no blocks. "
                "Take an earlier checkpoint, or quantize again."
            )
        if network.calibrated and {"min", "max"} <= ends.keys():
            least, most = ends["min"], ends["max"]
            # a step of training can carry one end past the other: AIMET takes the distance between them
            if not bool((torch.isfinite(least) & torch.isfinite(most)).all()):
                raise CheckpointError(
                    f"The range of {name!r} is NaN or infinite: expected finite ends. Take an earlier checkpoint, or "
                    "quantize again."
                )


def _check_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse float weights, and other ranges, before PyTorch lists hundreds of missing and unexpected keys."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if mine and f"{prefix}_extra_state" not in state_dict:
        name = prefix.rstrip(".") or "the network"
        raise CheckpointError(
            f"The checkpoint holds float weights for {name!r} (e.g. {mine[0]!r}), but the network is "
            "quantized already. Load the float weights before the Trainer sees the module, and give no "
            "ckpt_path:\n"
            "    module = MyModule.load_from_checkpoint(path)\n"
            "    trainer.fit(module)"
        )
    flow = module.__dict__[_STATE].dataflow
    stored = [place for place in flow.sources if f"{prefix}{quantizer_at(place)}.min" in state_dict]
    with converting_at(module, flow, stored):
        check_stored_ranges(module, state_dict, prefix)


def _fix_ranges(module: nn.Module, _: Any) -> None:
    """Set what follows from bits and grids, which a state has changed; those of earlier versions convert less."""
    set_fixed_ranges(one for one in module.modules() if isinstance(one, aimet.QuantizerBase))
    convert_where_needed(module, module.__dict__[_STATE].dataflow)
