"""Give modules that are PyTorch's own in all but name back their PyTorch class.

Libraries subclass: timm's ``Linear`` is ``nn.Linear`` with a cast for scripting, its ``BatchNormAct2d`` is
``nn.BatchNorm2d`` followed by an activation. AIMET looks classes up by exact type, so such a layer would
stay in float and such a batch norm could not be folded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.inputs import NetworkInputs


def use_torch_classes(network: nn.Module, inputs: NetworkInputs) -> None:
    """Replace, in place, each subclass of a known class by that class followed by its children.

    A module is replaced only if the replacement returns the same numbers for what the module is called with
    in the example, so a subclass that computes something else (padding like TensorFlow, say) stays.

    Args:
        network: the network to rewrite, in eval mode.
        inputs: an example call of it.
    """
    from aimet_torch.nn import QuantizationMixin

    known = QuantizationMixin.cls_to_qcls
    candidates: dict[str, type[nn.Module]] = {}
    for name, module in network.named_modules():
        base = next((cls for cls in type(module).__mro__ if cls in known), None)
        if name and base is not None and base is not type(module):
            candidates[name] = base
    if not candidates:
        return
    observed: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in candidates:

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name) -> None:
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                observed[name] = (args[0].clone(), output.clone())

        handles.append(network.get_submodule(name).register_forward_hook(observe, with_kwargs=True))
    inputs.call(network)
    for handle in handles:
        handle.remove()
    for name, (given, expected) in observed.items():
        replacement = _plain(network.get_submodule(name), candidates[name])
        try:
            same = torch.equal(replacement(given), expected)
        except Exception:  # a subclass with another signature or another number of children: leave it
            same = False
        if same:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, replacement)


def _plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """``module`` as an instance of ``base``, followed by the children it had."""
    plain = copy.copy(module)
    plain.__class__ = base
    plain.__dict__["_modules"] = {}
    children = [child for child in module.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(plain, *children) if children else plain
