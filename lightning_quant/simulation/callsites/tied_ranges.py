"""One range for a tensor and for all that hands its values on, as the NPU moves integers without another scale.

Max pooling, concatenation, resizing, slices and the like only choose among values. Between two different grids the
hardware would have to compute with them: it takes integers for what they are not, or computes in float. AIMET ties
what goes into a concatenation, as far as it follows tensors: not through pooling, nor through operations that it does
not know.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.attributes import NUMBER
from lightning_quant.simulation.callsites.functions import MOVES

# Modules that AIMET does not know to choose among values.
_CHOOSE = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
# Functions of two results: the values that they choose, and where those were.
_CHOOSE_WITH_PLACES = frozenset(("max", "min"))


def passes_values(sim: Any, op: Any) -> bool:
    """Return whether an operation outputs values of its first input as they are: a reshape, a slice, max pooling."""
    module = sim._get_qmodule(op)
    if module is None:
        return op.is_grid_preserving_op() or op.type in MOVES or op.type in _CHOOSE_WITH_PLACES
    return bool(module.__dict__.get("_moves") or isinstance(module, _CHOOSE) or op.is_grid_preserving_op())


def rounding(sim: Any, source: Any) -> Any:
    """Return the quantizer of an operation's output, or of the one whose values it only moves."""
    while source is not None:
        producer = sim._get_qmodule(source)
        quantizers: Any = getattr(producer, "output_quantizers", ())
        if len(quantizers) == 1 and quantizers[0] is not None:
            return quantizers[0]
        if not passes_values(sim, source):
            return None
        own: Any = getattr(producer, "input_quantizers", ())
        if len(own) and own[0] is not None:  # an input of the network, which comes here first
            return own[0]
        source = source.inputs[0].producer
    return None


def rounded_before(sim: Any, op: Any) -> tuple[Any, float]:
    """Return what rounds an operation's input, and the number that its values are multiplied with behind that."""
    from lightning_quant.simulation.aimet import custom

    factor = 1.0
    while True:
        inputs: Any = getattr(sim._get_qmodule(op), "input_quantizers", ())
        source = op.inputs[0].producer
        if (len(inputs) and inputs[0] is not None) or source is None:
            return inputs[0] if len(inputs) else None, factor
        module: Any = sim._get_qmodule(source)
        outputs: Any = getattr(module, "output_quantizers", ())
        if len(outputs) == 1 and outputs[0] is not None:
            return outputs[0], factor
        number = vars(module).get(NUMBER, 0.0) if module is not None else 0.0
        if number and isinstance(module, custom.Multiply | custom.Divide):
            factor *= number if isinstance(module, custom.Multiply) else 1 / number
        elif not passes_values(sim, source):
            return None, factor
        op = source


def roundings_of_input(sim: Any) -> list[Any]:
    """Return the quantizers of a network's input, and of what only moves its values.

    One that also rounds other values, as in a concatenation with them, is none of these.

    Args:
        sim: AIMET's simulation of a network with one input.
    """
    operations = sim.connected_graph.ordered_ops
    # a concatenation is of other values as well
    others = {one for op in operations if len(inputs_of_one_grid(sim, op)) != 1 for one in outputs(sim, op)}
    found: dict[Any, None] = {}
    for op in operations:
        own: Any = getattr(sim._get_qmodule(op), "input_quantizers", ())
        for quantizer, product in zip(own, op.inputs, strict=False):
            source = product.producer
            while source is not None and passes_values(sim, source):
                product = source.inputs[0]
                source = product.producer
            if quantizer is not None and quantizer not in others and source is None and product.is_model_input:
                found[quantizer] = None
    return list(found)


def leave_out_roundings(sim: Any) -> None:
    """Round no output of an operation that outputs rounded values as they are."""
    for op in sim.connected_graph.ordered_ops:
        module = sim._get_qmodule(op)
        if module is not None and passes_values(sim, op):
            for index in range(len(module.output_quantizers)):
                module.output_quantizers[index] = None


def tie_ranges(sim: Any) -> None:
    """Give the tensors before and after each operation that hands values on one quantizer, and parts of an input one.

    What a concatenation takes and others read as well keeps its own range, unless AIMET gave it that of the
    concatenation; it is rounded once more on the way in. A wider range would cost all its readers more than that. A
    tensor that is joined with what arithmetic makes of it has its own even then: boxes in pixels, made of a
    detector's outputs between 0 and 1, with the scores that are left of these.

    Args:
        sim: AIMET's simulation; changed in place, unless its graph does not cover the whole network.
    """
    if not sim.connected_graph.is_safe():  # as AIMET does
        return
    _part_from_what_is_made_of_it(sim)
    groups, readers = Groups(), _readers_of_inputs(sim)
    operations = sim.connected_graph.ordered_ops
    for op in sim.connected_graph.get_all_ops().values():  # forks too
        for quantizer in outputs(sim, op):  # one already, as that of a recurrent layer for all steps
            groups.join(quantizer, op)
        for index in inputs_of_one_grid(sim, op):
            if not (_is_concatenation(sim, op) and _is_read_elsewhere(sim, op, op.inputs[index], readers)):
                groups.join(_tensor(op, index), op)
    named = (input_name(one) for op in operations for one in op.inputs if one.producer is None and one.is_model_input)
    of_inputs = {groups.of(name) for name in named}
    # the last of each group
    shared = {groups.of(op): one for op in operations if hands_on(sim, op) for one in outputs(sim, op)}
    for op in operations:
        for index, own in enumerate(getattr(sim._get_qmodule(op), "input_quantizers", ())):
            tensor = groups.of(_tensor(op, index)) if index < len(op.inputs) else None
            if own is not None and tensor in of_inputs:
                shared.setdefault(tensor, own)
    for op in operations:
        module = sim._get_qmodule(op)
        quantizer = shared.get(groups.of(op))
        places: Any = getattr(module, "output_quantizers", ())
        for index, own in enumerate(places):
            places[index] = quantizer if quantizer is not None and own is not None else own
        inputs: Any = getattr(module, "input_quantizers", ())
        for index, (own, product) in enumerate(zip(inputs, op.inputs, strict=False)):
            quantizer = shared.get(groups.of(_tensor(op, index)))
            if quantizer is not None and (own is not None or product.producer is None):
                inputs[index] = quantizer
    for op in operations:
        for index in inputs_of_one_grid(sim, op) if outputs(sim, op) else ():
            before = rounding(sim, op.inputs[index].producer)
            if before not in (None, *outputs(sim, op)):
                sim._get_qmodule(op).input_quantizers[index] = outputs(sim, op)[0]


def _part_from_what_is_made_of_it(sim: Any) -> None:
    """Give a tensor a range of its own where a concatenation joins it with what arithmetic makes of it.

    Steps of a recurrence, each made of the one before, are alike: they keep one range.
    """
    for op in sim.connected_graph.ordered_ops:
        if not _is_concatenation(sim, op):
            continue
        sources = {_computed_by(sim, product): product for product in op.inputs}
        made_of = [
            source
            for source, product in sources.items()
            if _is_tied(sim, source, op)
            and any(_is_made_of(sim, one, source) for one in op.inputs if one is not product)
        ]
        if len(made_of) == 1:
            places = sim._get_qmodule(made_of[0]).output_quantizers
            places[0] = copy.deepcopy(places[0])


def _is_tied(sim: Any, source: Any, op: Any) -> bool:
    """Return whether an operation, no step of a recurrent layer, outputs one tensor with the range of another's."""
    module: Any = None if source is None else sim._get_qmodule(source)
    places: Any = getattr(module, "output_quantizers", ())
    is_step = module is not None and module.__dict__.get("_repeats") is not None
    return len(places) == 1 and not is_step and places[0] is not None and places[0] in outputs(sim, op)


def _computed_by(sim: Any, product: Any) -> Any:
    """Return the operation whose values a tensor holds, others having passed them on; ``None``: an input's."""
    source = product.producer
    while source is not None and passes_values(sim, source):
        source = source.inputs[0].producer
    return source


def _is_made_of(sim: Any, product: Any, source: Any) -> bool:
    """Return whether element-wise arithmetic makes a tensor of what an operation computes."""
    waiting, seen = [_computed_by(sim, product)], set()
    while waiting:
        op = waiting.pop()
        if op is None or op is source or op in seen or not isinstance(sim._get_qmodule(op), _arithmetic()):
            continue
        seen.add(op)
        before = [_computed_by(sim, one) for one in op.inputs if not one.is_parm]
        if source in before:
            return True
        waiting += before
    return False


@functools.cache
def _arithmetic() -> tuple[type[nn.Module], ...]:
    """Return the modules that compute element by element, and in other units than they are given."""
    from lightning_quant.simulation.aimet import custom

    names = "Add Subtract Multiply Divide Pow Square Sqrt RSqrt Exponential Log Neg Abs Sin Cos Maximum Minimum"
    known = tuple(getattr(custom, name) for name in names.split())
    return (*known, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ReLU, nn.ELU, nn.Hardsigmoid)


def _readers_of_inputs(sim: Any) -> dict[str, set[Any]]:
    """Return the operations that compute with an input of the network or join it, by its name."""
    readers: dict[str, set[Any]] = defaultdict(set)
    for op in sim.connected_graph.ordered_ops:
        for product in op.inputs if _is_concatenation(sim, op) or not passes_values(sim, op) else ():
            name = passed_input(sim, product)
            if name is not None:
                readers[name].add(op)
    return readers


def passed_input(sim: Any, product: Any) -> str | None:
    """Return the name of the input of the network that operations before this only pass on."""
    while product.producer is not None and passes_values(sim, product.producer):
        product = product.producer.inputs[0]
    return input_name(product) if product.producer is None and product.is_model_input else None


def _is_read_elsewhere(sim: Any, op: Any, product: Any, readers: Mapping[str, set[Any]]) -> bool:
    """Return whether what a concatenation takes goes to other operations, too, or what it was chosen from does."""
    name = passed_input(sim, product)
    if name is not None:  # AIMET's file has one range for what is joined from an input, and it has to be rounded first
        is_alone = sum(_is_concatenation(sim, one) for one in readers[name]) == 1
        return is_alone and readers[name] != {op} and rounding(sim, product.producer) is not None
    source = product.producer
    while source is not None and len(source.output_ops) == 1 and passes_values(sim, source):
        source = source.inputs[0].producer
    return source is not None and len(source.output_ops) > 1


def joined_and_read_elsewhere(sim: Any) -> Iterator[tuple[Any, int]]:
    """Yield concatenations and places of their inputs that go to other operations, too."""
    readers = _readers_of_inputs(sim)
    for op in sim.connected_graph.ordered_ops:
        for index in inputs_of_one_grid(sim, op) if _is_concatenation(sim, op) else ():
            if _is_read_elsewhere(sim, op, op.inputs[index], readers):
                yield sim._get_qmodule(op), index


def _tensor(op: Any, index: int) -> Any:
    """Return what stands for an input of an operation: its producer, or the name of the network's input."""
    product = op.inputs[index]
    if product.producer is None and product.is_model_input:
        return input_name(product)
    return product.producer or (op, index)


def input_name(product: Any) -> str:
    """Return the name of an input of the network: AIMET has a product for each operation that reads it."""
    return str(product.name.partition("_to_")[0])


def inputs_of_one_grid(sim: Any, op: Any) -> list[int]:
    """Return the places of the inputs of an operation that have the grid of its output."""
    tensors = [index for index, one in enumerate(op.inputs) if one.shape is not None and not one.is_parm]
    if _is_concatenation(sim, op):
        return tensors
    return tensors[:1] if _is_resize(sim, op) or passes_values(sim, op) else []  # the others are numbers, its new size


def hands_on(sim: Any, op: Any) -> bool:
    """Return whether an operation has the grid of what it is given: it passes values on, joins or resizes them."""
    return bool(inputs_of_one_grid(sim, op))


def joins(module: Any) -> bool:
    """Return whether a module makes one tensor of several: a concatenation, or a write to a part of a tensor."""
    from lightning_quant.simulation.aimet import custom

    return isinstance(module, (custom.Concat, custom.ScatterElements, custom.ScatterND))


def _is_concatenation(sim: Any, op: Any) -> bool:
    return joins(sim._get_qmodule(op))


def _is_resize(sim: Any, op: Any) -> bool:
    """Return whether an operation resizes an image, on hardware that computes this with one grid."""
    from lightning_quant.simulation.aimet import custom

    return sim._hw_version is not None and isinstance(sim._get_qmodule(op), (custom.Interpolate, nn.Upsample))


def outputs(sim: Any, op: Any) -> list[Any]:
    """Return the quantizers of what an operation computes."""
    return [one for one in getattr(sim._get_qmodule(op), "output_quantizers", ()) if one is not None]


class Groups:
    """What belongs together: tensors that share a range, each by the operation that computes it."""

    def __init__(self) -> None:
        self._same: dict[Any, Any] = {}

    def of(self, tensor: Any) -> Any:
        """Return what stands for the group of a tensor."""
        while tensor in self._same:
            tensor = self._same[tensor]
        return tensor

    def join(self, one: Any, other: Any) -> None:
        """Make the groups of two tensors one."""
        first, second = self.of(one), self.of(other)
        if first != second:
            self._same[first] = second
