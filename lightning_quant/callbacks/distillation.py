"""Distillation from the float network, whatever the user's ``training_step`` computes."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.callbacks.distillation_loss import DistillationLoss, class_axis, kl_gradient, mse_gradient
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.callsites.passes import paused
from lightning_quant.simulation.inputs import NetworkInputs, tensor_names, tensors_in, with_tensors

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
        used: whether any output of the network itself has received the gradient yet.
    """

    def __init__(self, teacher: nn.Module, loss: DistillationLoss, scale: Callable[[], float]) -> None:
        self.teacher = teacher.eval()
        self.loss = loss
        self.scale = scale
        self.used = False
        self._handles: list[RemovableHandle] = []
        self._targets: list[Tensor] | None = None  # known while the network is run
        self._seen: dict[str, list[list[Tensor]]] = {}  # in the teacher's pass, by feature

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
            network.register_forward_pre_hook(self._run_teacher, with_kwargs=True),
            network.register_forward_hook(self._compare),
            network.register_forward_hook(self._end_pass, always_call=True),
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

    def _run_teacher(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the float network, before the quantized one can change in place what both are given."""
        if not torch.is_grad_enabled():  # validation; not ``training``: some train in eval mode
            return
        self._seen.clear()
        # this is in a pass of the quantized network, whose operations are recognized by their place in the code
        with paused(), torch.no_grad():
            self._targets = tensors_in(NetworkInputs(args, kwargs).call(self.teacher))

    def _compare(self, network: nn.Module, args: Any, output: Any) -> Any:
        if self._targets is None:
            return output
        parts = []
        if self.loss.mse:
            parts.append(_Part(mse_gradient, self.loss.mse, range(len(self._targets))))
        if self.loss.kl:
            gradient = partial(kl_gradient, temperature=self.loss.temperature, axis=self.loss.axis)
            parts.append(_Part(gradient, self.loss.kl, compared_classes(output, self.loss)))
        self.used = self.used or any(map(_is_trained, tensors_in(output)))
        return self._with_gradients("the network", output, self._targets, parts)

    def _end_pass(self, network: nn.Module, args: Any, output: Any) -> None:
        self._targets = None
        self._seen.clear()

    def _note_feature(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # layers behind it may change them in place
        self._seen.setdefault(name, []).append([tensor.clone() for tensor in tensors_in(output)])

    def _compare_feature(self, name: str, weight: float, module: nn.Module, args: Any, output: Any) -> Any:
        outputs = tensors_in(output)
        if self._targets is None:
            # Called alone, the float network has nothing to compare; again by activation checkpointing, it has to do
            # what it did before.
            parts = [_Part(lambda own, target: torch.zeros_like(own), weight, range(len(outputs)))]
            return self._with_gradients(name, output, outputs, parts) if torch.is_grad_enabled() else output
        if not any(map(_is_trained, outputs)):
            raise ConfigurationError(
                f"distillation: features has {name!r}, which is run without gradients: expected a module whose output "
                "is trained, outside of torch.no_grad and of checkpoint(use_reentrant=True)."
            )
        waiting = self._seen.get(name)
        targets = waiting.pop(0) if waiting else []
        return self._with_gradients(name, output, targets, [_Part(mse_gradient, weight, range(len(targets)))])

    def _with_gradients(self, what: str, output: Any, targets: list[Tensor], parts: list[_Part]) -> Any:
        outputs = tensors_in(output)
        shapes, expected = ([tuple(one.shape) for one in tensors] for tensors in (outputs, targets))
        if shapes != expected:
            raise ConfigurationError(
                f"distillation: {what} returns {shapes or 'nothing'} while it trains, the float network, in eval mode, "
                f"{expected or 'nothing'}: expected the same tensors of both. Set distillation=0, or let features name "
                "modules whose output does not depend on the mode."
            )
        trained = [index for index, tensor in enumerate(outputs) if _is_trained(tensor)]
        of_tensor: dict[int, list[Gradient]] = defaultdict(list)
        for part in parts:
            chosen = [index for index in part.indices if index in trained]
            for index in chosen:
                of_tensor[index].append(partial(part.weighted, 1 / len(chosen)))

        def added(index: int, own: Tensor) -> Tensor:
            target = targets[index].to(own.dtype)
            return self.scale() * reduce(torch.add, (gradient(own, target) for gradient in of_tensor[index]))

        made = [
            _AddGradient.apply(tensor, partial(added, index)) if index in of_tensor else tensor
            for index, tensor in enumerate(outputs)
        ]
        return with_tensors(output, made)


@dataclass(frozen=True)
class _Part:
    """One loss: its gradient, its weight, and the positions of the tensors that share it."""

    gradient: Gradient
    weight: float
    indices: Sequence[int]

    def weighted(self, share: float, own: Tensor, target: Tensor) -> Tensor:
        return self.weight * share * self.gradient(own, target)


def _is_trained(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_floating_point()


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


def compared_classes(output: Any, loss: DistillationLoss) -> list[int]:
    """Return the positions of the tensors with classes, among all that a network returns.

    Args:
        output: what it returns; only names, shapes and types are looked at.
        loss: its ``classes`` are globs on the names of tensors, those of :func:`tensor_names`.

    Raises:
        ConfigurationError: if it is not known which tensors hold classes, or one of them has less than two.
    """
    if not loss.kl:
        return []
    names, tensors = tensor_names(output), tensors_in(output)
    globs = [loss.classes] if isinstance(loss.classes, str) else list(loss.classes)
    given = [name for name, tensor in zip(names, tensors, strict=True) if tensor.is_floating_point()]
    chosen = {name for glob in globs for name in fnmatch.filter(given, glob)} if globs else set(given)
    for glob in globs:
        if not fnmatch.filter(given, glob):
            raise ConfigurationError(
                f"distillation: classes={glob!r} names no tensor that the network returns: expected a glob on "
                f"{', '.join(given)}."
            )
    if not globs and len(given) > 1:
        raise ConfigurationError(
            f"distillation: kl of a network that returns {', '.join(given)}: expected the names of those that hold "
            f"classes, such as classes={given[0]!r}; what else it returns, mse and features compare."
        )
    for name, tensor in zip(names, tensors, strict=True):
        axis = class_axis(tensor, loss.axis)
        if name in chosen and not (-tensor.dim() <= axis < tensor.dim() and tensor.shape[axis] > 1):
            raise ConfigurationError(
                f"distillation: kl of {name!r}, whose shape is {tuple(tensor.shape)}: expected at least two classes on "
                f"axis {axis}. Give the axis of the classes, or use mse."
            )
    return [index for index, name in enumerate(names) if name in chosen]


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
        return output.clone()  # the user's code may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient + ctx.added(output.float()).to(gradient.dtype), None
