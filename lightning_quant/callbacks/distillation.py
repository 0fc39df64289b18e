"""Distillation from the float network, whatever the user's ``training_step`` computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import tensors_in, with_tensors


class Distillation:
    """Add the gradient of a distillation loss to that of the user's loss, at the network's output.

    The forward pass is the identity. The backward pass adds the gradient of ``weight · Σ (y − t)² / Σ t²``, averaged
    over the output's tensors, to the gradient of the user's loss: y is the output of the quantized network and t that
    of the float network for the same inputs. The network is trained on the sum of both losses; the user's step, loss
    and logged values do not change.

    Args:
        teacher: the float network; set to eval mode and never trained.
        weight: weight of the distillation loss relative to the user's.
        scale: returns the factor of the user's loss in the backward pass, see :func:`loss_scale`.

    Attributes:
        used: whether any output has received the gradient yet.
    """

    def __init__(self, teacher: nn.Module, weight: float, scale: Callable[[], float]) -> None:
        self.teacher = teacher.eval()
        self.weight = weight
        self.scale = scale
        self.used = False
        self._handle: RemovableHandle | None = None

    def attach(self, network: nn.Module) -> None:
        """Add the gradient to every output of ``network`` from now on."""
        self._handle = network.register_forward_hook(self, with_kwargs=True)

    def detach(self) -> None:
        """Leave the network alone again."""
        if self._handle is not None:
            self._handle.remove()

    def check_used(self, name: str) -> None:
        """Refuse a training step in which no output received the gradient.

        Args:
            name: dotted attribute of the LightningModule that holds the network.

        Raises:
            ConfigurationError: naming what has to be called.
        """
        if not self.used:
            raise ConfigurationError(
                f"distillation={self.weight}: training_step did not call self.{name} itself, or uses nothing of what "
                "it returned. Name the attribute that is called in network=..., or set distillation=0."
            )

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Attach the gradient to ``output``: a forward hook (``with_kwargs=True``)."""
        if not torch.is_grad_enabled():  # validation; not ``training``: some train in eval mode
            return output
        with torch.no_grad():
            targets = tensors_in(self.teacher(*args, **kwargs))
        outputs = tensors_in(output)
        differentiable = [tensor.requires_grad and tensor.is_floating_point() for tensor in outputs]
        weight = self.weight / max(sum(differentiable), 1)
        self.used = self.used or any(differentiable)
        return with_tensors(
            output,
            [
                _AddGradient.apply(tensor, target, weight, self.scale) if has_gradient else tensor
                for tensor, target, has_gradient in zip(outputs, targets, differentiable, strict=True)
            ],
        )


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
    """The identity; its backward pass adds the gradient of the distillation loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, weight: float, scale: Callable[[], float]) -> Tensor:
        ctx.save_for_backward(output, target)
        ctx.weight, ctx.scale = weight, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        output, target = (saved.float() for saved in ctx.saved_tensors)
        factor = 2 * ctx.weight * ctx.scale() / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        (gradient,) = gradients
        return gradient + (factor * (output - target)).to(gradient.dtype), None, None, None
