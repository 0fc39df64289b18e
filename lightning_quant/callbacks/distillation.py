"""Distillation from the float network, whatever the user's ``training_step`` computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_quant.simulation.inputs import tensors_in, with_tensors


class Distillation:
    """Adds the gradient of a distillation loss where it meets the user's own: at the network's output.

    The output passes unchanged. On the way back, the gradient of ``weight · Σ (y − t)² / Σ t²``, the mean of it over
    the output's tensors, is added to what arrives from the user's loss: y is the quantized network's output and t the
    float one's to the same inputs. So the network learns from the sum of both losses, and the user's step, loss and
    logged values stay as they are.

    Args:
        teacher: the float network; put in eval mode, never trained.
        weight: weight of the distillation loss beside the user's.
        scale: what the user's loss is multiplied with before it is differentiated, see :func:`loss_scale`.

    Attributes:
        used: whether an output was taught yet.
    """

    def __init__(self, teacher: nn.Module, weight: float, scale: Callable[[], float]) -> None:
        self.teacher = teacher.eval()
        self.weight = weight
        self.scale = scale
        self.used = False

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the quantized network (``with_kwargs=True``)."""
        if not torch.is_grad_enabled():  # validation; the mode says nothing, a network may be trained in eval mode
            return output
        with torch.no_grad():
            targets = tensors_in(self.teacher(*args, **kwargs))
        answers = tensors_in(output)
        taught = [answer.requires_grad and answer.is_floating_point() for answer in answers]
        share = self.weight / max(sum(taught), 1)
        self.used = self.used or any(taught)
        return with_tensors(
            output,
            [
                _Taught.apply(answer, target, share, self.scale) if teach else answer
                for answer, target, teach in zip(answers, targets, taught, strict=True)
            ],
        )


def loss_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss in 16-bit training, and skips steps whose gradients are not finite."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: pl.Trainer) -> float:
    """What Lightning multiplies the loss with: the loss scale of 16-bit training, divided by accumulated batches."""
    scaler = loss_scaler(trainer)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    assert trainer.lightning_module is not None
    return scale / trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else scale


class _Taught(torch.autograd.Function):
    """The identity, whose gradient has that of the distillation loss added."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, target: Tensor, weight: float, scale: Callable[[], float]) -> Tensor:
        ctx.save_for_backward(answer, target)
        ctx.weight, ctx.scale = weight, scale
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        answer, target = (saved.float() for saved in ctx.saved_tensors)
        factor = 2 * ctx.weight * ctx.scale() / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        (gradient,) = gradients
        return gradient + (factor * (answer - target)).to(gradient.dtype), None, None, None
