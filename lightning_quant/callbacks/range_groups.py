"""Learned ranges in optimizer groups of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from operator import not_
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_quant.callbacks.float_view import without_quantizers

# What a group of ranges does not copy from the group that it follows.
_OWN = ("params", "param_names", "name", "weight_decay")
# Orthogonalizes matrices, which a range is not. In PyTorch since 2.9.
_MATRICES_ONLY: Any = getattr(torch.optim, "Muon", ())


class RangeGroups:
    """Train each range as the layer that it belongs to is trained, but without weight decay.

    A range goes to the optimizer that holds the parameters of its layer, into a group of its own that follows theirs in
    everything but the decay: learning rate, momentum and whatever else schedulers, callbacks or the user change in it.
    A layer without parameters follows those before it, in the same part of the network. Where several groups train
    them, it follows the one that trains most; where most of them are in no optimizer, the range is not trained, and
    where most are frozen, it is frozen too, until they are thawed. A group that the user made for ranges alone stays
    as it is.

    Args:
        optimizers: the Trainer's, as the user made them.
        network: the quantized network.
        name: its dotted name in the LightningModule, for optimizers that know their parameters by name.
        fixed: ranges that never learn, even if all parameters of the network are thawed.
        frozen: ranges that :func:`freeze_with_layers` froze.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        network: nn.Module,
        name: str,
        fixed: Iterable[nn.Parameter] = (),
        frozen: Iterable[nn.Parameter] = (),
    ) -> None:
        self._optimizers = optimizers
        self._fixed = list(fixed)
        self._followed = followed_by_ranges(network)
        self._names = {parameter: path for path, parameter in network.named_parameters()}
        self._prefix = f"{name}."
        self._weights = [parameter for parameter in self._names if parameter not in self._followed]
        self._trained: list[bool] = []
        self._frozen = set(frozen)
        self._last: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._matrices = {
            parameter
            for optimizer in optimizers
            if isinstance(optimizer, _MATRICES_ONLY)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._ours = set(self._followed)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            if not self.is_given(group):  # made for ranges alone, by the user
                self._ours.difference_update(group["params"])
        self._shape: list[list[int]] = []
        self._pairs: list[tuple[Optimizer, int, int]] = []
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
                optimizer.register_step_pre_hook(lambda *_: self.follow())
                optimizer.register_state_dict_pre_hook(lambda *_: self.follow())
                optimizer.register_load_state_dict_pre_hook(lambda *_: self.follow())
                optimizer.register_load_state_dict_post_hook(lambda *_: self._remember())
            # else one that wraps another, and was not initialized itself: the ranges follow from batch to batch
        self.follow()
        if self._matrices and not self._pairs:
            rank_zero_warn(
                "The ranges do not learn: the optimizer trains matrices only. Expected a second one, e.g. AdamW, for "
                "biases and norms, which takes the ranges too; or set train_ranges=False."
            )

    def is_given(self, group: dict[str, Any]) -> bool:
        """Whether a group is one of the user's."""
        return not (group["params"] and all(parameter in self._ours for parameter in group["params"]))

    def follow(self) -> None:
        """Update every group of ranges from the group that it follows."""
        self._freeze()
        shape = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self._optimizers]
        if shape != self._shape:  # at first, and when groups are added: a finetuning callback thaws layer by layer
            self._arrange()
        else:
            self._hand_on_last()
        for optimizer, index, source in self._pairs:
            group, given = optimizer.param_groups[index], optimizer.param_groups[source]
            group.update({key: given[key] for key in given if key not in _OWN})
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        self._remember()

    def _remember(self) -> None:
        """Keep what the last groups hold, the user's and that of all, to see what is written to them."""
        self._last = [
            (_settings(self._given_last(optimizer)), _settings(_last(optimizer))) for optimizer in self._optimizers
        ]

    def _given_last(self, optimizer: Optimizer) -> dict[str, Any]:
        return next((group for group in reversed(optimizer.param_groups) if self.is_given(group)), {})

    def _hand_on_last(self) -> None:
        """Give the last group that the user made what was written to ``param_groups[-1]``, which was theirs once.

        Who writes to all groups has written to that one too, and what it was given stays.
        """
        for optimizer, (given, known) in zip(self._optimizers, self._last, strict=True):
            mine, last = self._given_last(optimizer), _last(optimizer)
            if last is not mine:
                written = {key: value for key, value in _settings(last).items() if value != known.get(key)}
                mine.update({key: value for key, value in written.items() if mine.get(key) == given.get(key)})

    def _freeze(self) -> None:
        """Freeze the ranges of frozen layers, and thaw them with their layers; fixed ranges stay frozen."""
        for parameter in self._fixed:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
        trained = [parameter.requires_grad for parameter in self._weights]
        if trained == self._trained:
            return
        self._trained = trained
        for parameter, followed in self._followed.items():
            frozen = _is_frozen(followed)
            if frozen and parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
                self._frozen.add(parameter)
            elif not frozen and parameter in self._frozen:  # others were frozen by the user
                parameter.requires_grad_(True)
                self._frozen.discard(parameter)

    def _arrange(self) -> None:
        """Move ranges out of the user's groups, add those whose layer is trained, and see which group follows which."""
        trained = set()
        wanted: dict[tuple[int, int], list[nn.Parameter]] = {}
        places = self._places()
        for number, optimizer in enumerate(self._optimizers):
            for index, group in enumerate(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if parameter in self._followed]
                trained.update(inside)
                is_range = [parameter in self._followed for parameter in group["params"]]
                if any(is_range) and not all(is_range) and not isinstance(optimizer, LBFGS):
                    for key in ("params", "param_names"):
                        if key in group:
                            group[key] = list(compress(group[key], map(not_, is_range)))
                    for parameter in inside:
                        wanted.setdefault(self._place(parameter, places) or (number, index), []).append(parameter)
        for parameter in self._followed:
            if parameter not in trained and (place := self._place(parameter, places)) is not None:
                wanted.setdefault(place, []).append(parameter)
        order = {parameter: number for number, parameter in enumerate(self._followed)}
        for (number, index), ranges in sorted(wanted.items()):
            self._add(self._optimizers[number], index, sorted(ranges, key=order.__getitem__))
        self._shape = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self._optimizers]
        places = self._places()
        self._pairs = []
        for number, optimizer in enumerate(self._optimizers):
            for index, group in enumerate(optimizer.param_groups):
                source = None if self.is_given(group) else self._place(group["params"][0], places)
                if source is not None and source[0] == number:
                    self._pairs.append((optimizer, index, source[1]))

    def _places(self) -> dict[nn.Parameter, tuple[int, int]]:
        """Return the optimizer and group of every parameter that ranges could follow."""
        return {
            parameter: (number, index)
            for number, optimizer in enumerate(self._optimizers)
            if not isinstance(optimizer, _MATRICES_ONLY)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }

    def _place(self, parameter: nn.Parameter, places: dict[nn.Parameter, tuple[int, int]]) -> tuple[int, int] | None:
        """Return the group to follow: the one that trains most of what the range belongs to."""
        followed = [one for one in self._followed[parameter] if one not in self._matrices]
        if len(followed) < len(self._followed[parameter]) and not followed:  # then with other biases and norms
            followed = [one for one in self._weights if one in places]
        found: dict[tuple[int, int] | None, int] = {}
        for one in followed:
            found[places.get(one)] = found.get(places.get(one), 0) + one.numel()
        return max(found, key=found.__getitem__, default=None)

    def _add(self, optimizer: Optimizer, index: int, ranges: list[nn.Parameter]) -> None:
        given = optimizer.param_groups[index]
        if isinstance(optimizer, LBFGS):  # knows one group, and no weight decay
            given["params"].extend(ranges)
            return
        group = {**given, "params": ranges}
        if "name" in group:  # which Lightning wants to be different for each
            group["name"] = f"{given['name']}-ranges"
        if "param_names" in group:
            group["param_names"] = self._names_for(given, ranges)
        optimizer.add_param_group(group)

    def _names_for(self, given: dict[str, Any], ranges: list[nn.Parameter]) -> list[str]:
        """Return names of ranges, with the prefix that the user's own names have."""
        prefix = self._prefix
        for parameter, name in zip(given["params"], given["param_names"], strict=True):
            path = self._names.get(parameter)
            if path is not None and name.endswith(path):
                prefix = name.removesuffix(path)
                break
        return [prefix + self._names[parameter] for parameter in ranges]


def freeze_with_layers(network: nn.Module) -> list[nn.Parameter]:
    """Freeze the ranges of frozen layers, and return them: before a strategy looks which parameters get gradients."""
    frozen = [
        one for one, followed in followed_by_ranges(network).items() if one.requires_grad and _is_frozen(followed)
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _is_frozen(followed: Iterable[nn.Parameter]) -> bool:
    return sum(-one.numel() if one.requires_grad else one.numel() for one in followed) > 0


def _last(optimizer: Optimizer) -> dict[str, Any]:
    """Return the last group; an empty one of an optimizer that has none, as one that a user made by hand may."""
    return optimizer.param_groups[-1] if optimizer.param_groups else {}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's numbers and switches, which a user may write to; tensors are not compared."""
    return {key: value for key, value in group.items() if key not in _OWN and not isinstance(value, torch.Tensor)}


def followed_by_ranges(network: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Return for each range the parameters that it is trained with.

    These are the parameters of its layer; for a layer without any, those of the layers before it in the smallest part
    of the network that has some, or of all layers there if none comes before.
    """
    names = {module: name for name, module in network.named_modules()}  # with the modules at call sites
    with without_quantizers(network) as quantizers:
        shown = {name: list(module.parameters(recurse=False)) for name, module in network.named_modules()}
        own = {name: shown.get(name, []) for name in names.values()}
        found: dict[nn.Parameter, list[nn.Parameter]] = {}
        for layer, parts in quantizers.items():
            followed = list(layer.parameters()) or _before(names[layer], own)
            for part in parts:
                for parameter in part.parameters():
                    found.setdefault(parameter, followed)
    return found


def _before(name: str, own: dict[str, list[nn.Parameter]]) -> list[nn.Parameter]:
    """Return the parameters before the layer ``name``; ``own`` holds those of each, in the order of the network."""
    before = set(list(own)[: list(own).index(name)])
    part = name
    while part:
        part = part.rpartition(".")[0]
        around = [one for one in own if own[one] and (not part or one == part or one.startswith(f"{part}."))]
        if around:
            return [parameter for one in ([one for one in around if one in before] or around) for parameter in own[one]]
    return []
