"""Gradients that are NaN or infinite: noticed at the first step, and traced to a layer where that is possible."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.random_state import random_state_kept

_QUANTIZER = re.compile(r"\.(param|input|output)_quantizers\..*")


@dataclass(frozen=True)
class Step:
    """A step of an optimizer.

    Args:
        number: counted from 1.
        epoch: in which it is, counted from 0.
        batch: the last one that its gradients are of, counted from 0 in the epoch.
    """

    number: int
    epoch: int
    batch: int


class GradientWatch:
    """Check the gradients of every step without waiting for the device.

    On a CPU the answer is there at once. Elsewhere one flag is computed on the device, copied while it works on, and
    read when the next step is checked: the device has the work of that step to do meanwhile. It is not read earlier
    where it happens to be there: the processes of a run have to learn of it at the same step.

    Args:
        late: whether to read one step late; ``None`` leaves it to the device.
    """

    def __init__(self, late: bool | None = None) -> None:
        self._late = late
        self._pending: tuple[Step, _Flag] | None = None

    def check(self, parameters: Iterable[nn.Parameter], step: Step) -> Step | None:
        """Check the gradients of a step that is about to be taken.

        Returns:
            That step, or the one before it, if it is known now to have gradients that are not finite.
        """
        finite = _all_finite(parameters)
        bad = self.last()
        if finite is None:
            return bad
        if not (finite.device.type != "cpu" if self._late is None else self._late):
            return None if finite else step
        self._pending = step, _Flag(finite)
        return bad

    def last(self) -> Step | None:
        """Return the step whose flag was not read yet, if its gradients were not finite. Waits for it."""
        if self._pending is None:
            return None
        (step, flag), self._pending = self._pending, None
        return None if flag.read() else step

    def forget(self) -> None:
        """Discard the flag unread: training has ended for another reason."""
        self._pending = None


class _Flag:
    """A truth value on its way from the device."""

    def __init__(self, value: Tensor) -> None:
        self._copied = None
        if value.is_cuda:  # into pinned memory, while the device works on
            value = value.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._value = value

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)


_REMEDIES = "Lower the learning rate, set Trainer(gradient_clip_val=...), or look at that batch."


def describe_before(step: Step, where: str, scale: float | None = None) -> str:
    """Describe a step that was not taken for its gradients.

    Args:
        step: the step.
        where: where the first number that is not finite comes from.
        scale: the loss scale, if the loss is scaled.
    """
    if scale is None:
        return (
            f"{_named(step)}: {where}. Expected finite ones. The step was not taken, so the weights are those of "
            f"the step before. {_REMEDIES}"
        )
    return (
        f"{_named(step)}: {where}. Expected finite ones. The loss scale has fallen to {scale:g}, so it is not the "
        "scaling that makes them overflow. Steps like this one are skipped, so the weights are those of the last "
        f"finite step. {_REMEDIES} precision='bf16-mixed' has the range of float32."
    )


def describe_after(step: Step) -> str:
    """Describe a step that was taken before its gradients were known."""
    return (
        f"{_named(step)}. Expected finite ones. The step was taken, since on this device they are known one step "
        f"later: do not use its weights, resume from a checkpoint before it. {_REMEDIES} On a CPU the layer they come "
        "from is named."
    )


def _named(step: Step) -> str:
    return f"Step {step.number} (epoch {step.epoch}, batch {step.batch}) has gradients that are not finite"


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether no gradient holds NaN or infinity. Waits for the device."""
    finite = _all_finite(parameters)
    return finite is None or bool(finite)


def _all_finite(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Whether all gradients are finite, on their device: one pass over them. ``None`` without a gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if not gradients:
        return None
    return torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf))


def origin(network: QuantizedNetwork, calls: Iterable[NetworkInputs]) -> str:
    """Find where the first number that is not finite comes from, in words.

    The network is called once more as the step did; its state and the random numbers stay as they are.
    """
    calls = list(calls)
    if not all(_finite(tensor) for tensor in calls[0].tensors):
        return "the batch itself holds NaN or Inf"
    for name, parameter in network.named_parameters():
        if not _finite(parameter):
            return f"parameter {_readable(name)!r} was not finite before the step"
    found: list[str] = []
    quantizers = set(network.quantizers())  # some turn NaN into a number: what they are given counts as well
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: _note(
                found, name, (args, output) if module in quantizers else output
            )
        )
        for name, module in network.named_modules()
    ]
    before = network.snapshot()
    try:
        with random_state_kept(), torch.no_grad():
            for call in calls:
                call.call(network.network)
    finally:
        for handle in handles:
            handle.remove()
        network.restore(before)
    if found:  # the innermost module ends first
        return f"the output of layer {_readable(found[0])!r} is the first that is not finite"
    bad = [name for name, p in network.named_parameters() if p.grad is not None and not _finite(p.grad)]
    where = f", the last layer with such a gradient is {_readable(bad[-1])!r}" if bad else ""
    return f"every layer's output is finite, so it comes from the loss or its gradient{where}"


def _note(found: list[str], name: str, output: Any) -> None:
    if not found and not all(_finite(tensor) for tensor in tensors_in(output)):
        found.append(name)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _readable(name: str) -> str:
    """The name in the user's network: a quantizer counts as its layer."""
    return _QUANTIZER.sub("", name.removeprefix("network."))
