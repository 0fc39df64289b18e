"""Distillation from the float network, whatever the user's ``training_step`` computes."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.callbacks.distillation_loss import DistillationLoss, kl_gradient, mse_gradient
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import tensors_in, with_tensors

# Of an output and of the float network's: the gradient of a loss with respect to the former.
Gradient = Callable[[Tensor, Tensor], Tensor]


class Distillation:
    """Add the gradient of a distillation loss to that of the user's loss, at the network's output and within it.

    The forward pass is the identity. The backward pass adds the gradients of the parts of a
    :class:`~lightning_quant.callbacks.distillation_loss.DistillationLoss` where the tensors are that they compare. The
    network is trained on the sum of both losses; the user's step, loss and logged values do not change.

    Args:
        teacher: the float network; set to eval mode and never trained.
        loss: what is compared.
        scale: returns the factor of the user's loss in the backward pass, see :func:`loss_scale`.

    Attributes:
        used: whether any output has received the gradient yet.
    """

    def __init__(self, teacher: nn.Module, loss: DistillationLoss, scale: Callable[[], float]) -> None:
        self.teacher = teacher.eval()
        self.loss = loss
        self.scale = scale
        self.used = False
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[str, list[_Targets]] = defaultdict(list)
        self._seen: dict[str, list[list[Tensor]]] = defaultdict(list)

    def attach(self, network: nn.Module) -> None:
        """Add the gradient to every output of ``network``, and of the layers that are compared, from now on.

        Raises:
            ConfigurationError: for a feature that the float network does not have.
        """
        for name, weight in features_in(self.teacher, self.loss).items():
            self._handles += [
                network.get_submodule(name).register_forward_hook(partial(self._compare_feature, name, weight)),
                self.teacher.get_submodule(name).register_forward_hook(partial(self._note_feature, name)),
            ]
        self._handles += [
            network.register_forward_pre_hook(lambda *_: self._waiting.clear()),
            network.register_forward_hook(self, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Leave the network alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check_used(self, name: str) -> None:
        """Refuse a training step in which no output received the gradient.

        Args:
            name: dotted attribute of the LightningModule that holds the network.

        Raises:
            ConfigurationError: naming what has to be called.
        """
        if not self.used:
            raise ConfigurationError(
                f"distillation={self.loss.argument}: training_step did not call self.{name} itself, or uses nothing of "
                "what it returned. Name the attribute that is called in network=..., or set distillation=0."
            )

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Attach the gradient to ``output``: a forward hook (``with_kwargs=True``)."""
        if not torch.is_grad_enabled():  # validation; not ``training``: some train in eval mode
            return output
        self._seen.clear()
        with torch.no_grad():
            targets = tensors_in(self.teacher(*args, **kwargs))
        for name, waiting in self._waiting.items():
            for one, found in zip(waiting, self._seen[name], strict=True):
                one.tensors = found
        self._waiting.clear()
        compared = [(mse_gradient, self.loss.mse)]
        compared.append((partial(kl_gradient, temperature=self.loss.temperature, axis=self.loss.axis), self.loss.kl))
        return self._with_gradients(output, _Targets(targets), [(one, weight) for one, weight in compared if weight])

    def _compare_feature(self, name: str, weight: float, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        targets = _Targets()
        self._waiting[name].append(targets)  # the teacher is run at the end of this pass
        return self._with_gradients(output, targets, [(mse_gradient, weight)])

    def _note_feature(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._seen[name].append(tensors_in(output))

    def _with_gradients(self, output: Any, targets: _Targets, parts: list[tuple[Gradient, float]]) -> Any:
        outputs = tensors_in(output)
        differentiable = [tensor.requires_grad and tensor.is_floating_point() for tensor in outputs]
        share = 1 / max(sum(differentiable), 1)
        self.used = self.used or any(differentiable)

        def added(index: int, own: Tensor) -> Tensor:
            if not targets.tensors:  # of a module that was called alone: the float network has nothing to compare
                return torch.zeros_like(own)
            target = targets.tensors[index].to(own.dtype)
            factor = share * self.scale()
            return reduce(torch.add, (weight * factor * gradient(own, target) for gradient, weight in parts))

        made = [
            _AddGradient.apply(tensor, partial(added, index)) if has_gradient and parts else tensor
            for index, (tensor, has_gradient) in enumerate(zip(outputs, differentiable, strict=True))
        ]
        return with_tensors(output, made)


def features_in(network: nn.Module, loss: DistillationLoss) -> dict[str, float]:
    """Return the weights of the modules whose outputs are compared, by their names in the network.

    Raises:
        ConfigurationError: for a glob that matches no module.
    """
    names = [name for name, _ in network.named_modules() if name]
    found: dict[str, float] = {}
    for glob, weight in loss.features.items():
        matched = fnmatch.filter(names, glob)
        if not matched:
            raise ConfigurationError(
                f"distillation: features={glob!r} names no module of the network: expected a glob on names such as "
                f"{', '.join(names[:5])}."
            )
        found.update(dict.fromkeys(matched, weight))
    return found


class _Targets:
    """The float network's tensors, known once it was run."""

    def __init__(self, tensors: list[Tensor] | None = None) -> None:
        self.tensors = tensors or []


def loss_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return the scaler of 16-bit training, which skips steps with gradients that are not finite, or ``None``."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: pl.Trainer) -> float:
    """Return Lightning's factor of the loss: the loss scale of 16-bit training over the accumulated batches."""
    scaler = loss_scaler(trainer)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    assert trainer.lightning_module is not None
    return scale / trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else scale


class _AddGradient(torch.autograd.Function):
    """The identity; its backward pass adds what a function makes of the tensor, in float32."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, added: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(output)
        ctx.added = added
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient + ctx.added(output.float()).to(gradient.dtype), None
