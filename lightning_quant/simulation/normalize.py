"""Give modules that are PyTorch's own in all but name their PyTorch class.

Libraries subclass: timm's ``BatchNormAct2d`` is ``nn.BatchNorm2d`` followed by an activation, and torchvision's
``FrozenBatchNorm2d`` is one in eval mode. AIMET looks classes up by exact type, so it would fold none of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs

# How far a batch norm written as a product and a sum may be from PyTorch's own, relative to the largest value.
_ROUNDING = 1e-5


def use_torch_classes(network: nn.Module, inputs: NetworkInputs) -> dict[str, str]:
    """Replace, in place, each subclass of a known class by that class followed by its children.

    A module is replaced only if the replacement returns the same numbers for what the module is called with
    in the example, so a subclass that computes something else (padding like TensorFlow, say) stays.

    Args:
        network: the network to rewrite, in eval mode.
        inputs: an example call of it.

    Returns:
        The new names of modules that were replaced → their own.
    """
    known = aimet.QuantizationMixin.cls_to_qcls
    candidates: dict[str, Callable[[Any], nn.Module]] = {}
    for name, module in network.named_modules():
        base = next((cls for cls in type(module).__mro__ if cls in known), None)
        if name and base is not None and base is not type(module):
            candidates[name] = functools.partial(_plain, base=base)
        elif name and _is_frozen_norm(module):
            candidates[name] = _unfrozen
    if not candidates:
        return {}
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
    renamed = {}
    for name, (given, expected) in observed.items():
        try:
            replacement = candidates[name](network.get_submodule(name))
            actual = replacement(given)
            same = torch.allclose(actual, expected, rtol=0, atol=_ROUNDING * float(expected.abs().max()))
        except Exception:  # a subclass with another signature or another number of children: leave it
            same = False
        if same:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, replacement)
            renamed[f"{name}.0" if isinstance(replacement, nn.Sequential) else name] = name
    return renamed


def _plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """``module`` as an instance of ``base``, followed by the children it had."""
    plain = copy.copy(module)
    plain.__class__ = base
    plain.__dict__["_modules"] = {}
    children = [child for child in module.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(plain, *children) if children else plain


def _is_frozen_norm(module: nn.Module) -> bool:
    """Return whether a module holds what a batch norm does, and nothing to train."""
    held = {name for name, _ in module.named_buffers(recurse=False)}
    return held >= {"weight", "bias", "running_mean", "running_var"} and not list(module.parameters(recurse=False))


def _unfrozen(module: Any) -> nn.Module:
    norm = nn.BatchNorm2d(module.weight.numel(), eps=float(getattr(module, "eps", 1e-5)), device=module.weight.device)
    for part in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, part).data.copy_(getattr(module, part))
    return norm.eval()
