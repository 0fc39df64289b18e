"""What the quantized network learns from the float one: which tensors are compared, how, and how much it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError


@dataclass(frozen=True)
class DistillationLoss:
    """Weights of losses beside the user's own; y is a tensor of the quantized network and t that of the float one.

    Args:
        mse: of ``Σ (y − t)² / Σ t²``, averaged over the tensors that the network returns.
        kl: of the Kullback-Leibler divergence from the classes of the float network, softmax(t/T), to those of the
            quantized one, softmax(y/T), times T² (Hinton et al., "Distilling the Knowledge in a Neural Network",
            1503.02531), averaged over positions and samples and over the tensors that hold classes.
        temperature: T.
        classes: which tensors hold classes, as globs on their names: the keys and positions in what the network
            returns, joined by underscores. Needed where it returns several.
        axis: where the classes lie. ``None``: last in tensors with three axes, as of tokens, else second.
        features: like ``mse``, of what modules return, by globs on their names.
    """

    mse: float = 0.0
    kl: float = 0.0
    temperature: float = 1.0
    classes: str | Sequence[str] = ()
    axis: int | None = None
    features: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: float | Mapping[str, Any]) -> DistillationLoss:
        """Make one from the weight of ``mse``, or from its arguments.

        Raises:
            ConfigurationError: for an unknown argument, a weight below 0, or no weight above 0 in a mapping.
        """
        if isinstance(given, Mapping):
            names = [one.name for one in fields(cls)]
            if unknown := sorted(given.keys() - set(names)):
                raise ConfigurationError(f"distillation has {unknown[0]!r}: expected {', '.join(names)}.")
            made = cls(**given)
        else:
            made = cls(mse=given)
        weights: dict[str, Any] = {"mse": made.mse, "kl": made.kl}
        weights |= made.features if isinstance(made.features, Mapping) else {"features": made.features}
        for name, weight in weights.items():
            if not _is_number(weight) or weight < 0:
                what = "distillation" if not isinstance(given, Mapping) else f"distillation: {name}"
                raise ConfigurationError(f"{what}={weight!r}: expected a weight of at least 0.")
        if not _is_number(made.temperature) or made.temperature <= 0:
            raise ConfigurationError(f"distillation: temperature={made.temperature!r}: expected a number above 0.")
        if not (made.axis is None or isinstance(made.axis, int)):
            raise ConfigurationError(f"distillation: axis={made.axis!r}: expected the axis of the classes, or None.")
        if not (isinstance(made.classes, Sequence) and all(isinstance(one, str) for one in made.classes)):
            raise ConfigurationError(f"distillation: classes={made.classes!r}: expected names of tensors.")
        if isinstance(given, Mapping) and not made:
            raise ConfigurationError(
                f"distillation={dict(given)!r}: expected a weight above 0 for mse, kl or features."
            )
        return made

    def __bool__(self) -> bool:
        """Return whether anything counts."""
        return any((self.mse, self.kl, *self.features.values()))

    @property
    def argument(self) -> float | dict[str, Any]:
        """What :meth:`parse` makes it of: a number, or what is not at its default."""
        defaults = vars(DistillationLoss())
        changed = {name: value for name, value in vars(self).items() if value != defaults[name]}
        return self.mse if changed.keys() <= {"mse"} else changed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mse_gradient(output: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of ``Σ (y − t)² / Σ t²`` with respect to y."""
    return 2 / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny) * (output - target)


def class_axis(tensor: Tensor, axis: int | None) -> int:
    """Return the axis of the classes: the one that is given, else the last of three, else the second."""
    return axis if axis is not None else tensor.dim() - 1 if tensor.dim() == 3 else 1


def kl_gradient(output: Tensor, target: Tensor, temperature: float, axis: int | None) -> Tensor:
    """Return the gradient of the divergence ``kl`` with respect to y.

    ``T · (softmax(y/T) − softmax(t/T))`` over the positions that have classes: equation 2 of 1503.02531, times T².
    """
    place = class_axis(output, axis)
    positions = output.numel() // output.shape[place]
    difference = (output / temperature).softmax(place) - (target / temperature).softmax(place)
    return temperature / positions * difference
