"""From a batch to the network's inputs, as the user's own steps make them.

Only the user's own ``validation_step`` (or whichever step there is) knows how a batch turns into calls of the network.
So a step is run, and what it calls the network with is caught. All that it changes is restored afterwards, see
:mod:`lightning_quant.callbacks.dry_run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_quant.callbacks.data import batches, stage_loader
from lightning_quant.callbacks.dry_run import dry_run
from lightning_quant.callbacks.lightning_internals import make_optimizers, transferred
from lightning_quant.callbacks.lightning_packages import is_overridden
from lightning_quant.callbacks.logs import log
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.batch_axes import Axes, NoBatchAxisError, find_axes, fit
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.switched_off import unrounded

# Relative to the largest output: a batch is computed in another order than a sample.
_TOLERANCE = 1e-3
_STEPS = ("validation_step", "test_step", "predict_step", "training_step", "forward")


class _StopStep(BaseException):
    """Ends the user's step at the network's call. Not an Exception, so that ``except Exception`` does not catch it."""


@dataclass
class _Run:
    """Record what a step did.

    Attributes:
        calls: of the network, in order.
        done: how many of them returned.
        error: what ended the step, if anything did.
    """

    calls: list[NetworkInputs] = field(default_factory=list)
    done: int = 0
    error: Exception | None = None


class InputCatcher:
    """Turn batches into the calls of a network that the user's own steps make with them.

    The first batch runs the step to its end, to see how often it calls the network. If that is once, later steps stop
    at this call: no loss, no metric. If it is more often, as with recurrent states, siamese networks or a
    discriminator, every step runs to its end, and the network computes in float: its states are its own.

    Args:
        trainer: the Trainer, for its transfer hooks and device.
        pl_module: the module whose steps are run.
        name: dotted attribute of the network in it.
        quantized: the quantized network, if it is quantized already: the inputs it was built with reveal
            calls that a step makes with a batch it was not written for.
        first: the step to try first.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        name: str,
        quantized: QuantizedNetwork | None = None,
        first: str = _STEPS[0],
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._name = name
        self._network = pl_module.get_submodule(name)
        self._quantized = quantized
        steps = [step for step in (first, *_STEPS) if step == "forward" or is_overridden(step, pl_module)]
        self._steps = list(dict.fromkeys(steps))
        self._runs_on = True
        self._plain: list[NetworkInputs] | None = None
        self._axes: list[Axes] = []

    def catch(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[NetworkInputs]:
        """Return the calls of the network that a step makes for ``batch``, in order; the last one is marked.

        Raises:
            CalibrationError: when no step of the module gets as far as calling the network.
        """
        batch = self._to_device(batch, dataloader_idx)
        calls, failures = self._calls(batch, batch_idx, dataloader_idx)
        if not calls:
            calls = self._unlabeled_calls(batch)
        if not calls:
            raise CalibrationError(
                f"Could not get from batch {batch_idx} to the network {self._name!r}: {'; '.join(failures)}. Expected "
                f"a step of {type(self._module).__name__} that calls self.{self._name}(...) itself with this batch. "
                "Name the attribute that is called in network=..., or give a calibration_dataloader with batches like "
                "those of validation."
            )
        calls = [replace(self._with_axes(call), last=False) for call in calls]
        return [*calls[:-1], replace(calls[-1], last=True)]

    def learn_axes(self, pair: Sequence[Any]) -> None:
        """Find the batch axes of the network's inputs.

        Args:
            pair: batches of two and of three times the same sample, see
                :func:`~lightning_quant.callbacks.data.twin_batches`. Nothing is learned from none, nor where
                the steps take batches of a certain size only.
        """
        calls = [self._calls(self._to_device(batch, 0), 0, 0, learning=True)[0] for batch in pair]
        if len({len(one) for one in calls}) != 1:
            return
        for two, three in zip(*calls, strict=True):
            with suppress(NoBatchAxisError):
                axes = find_axes((two.args, two.kwargs), (three.args, three.kwargs))
                if axes not in self._axes:
                    self._axes.append(axes)

    def check_axes(self, call: NetworkInputs) -> None:
        """Refuse a call whose batch axis is unknown.

        Where no batches of other sizes could be compared, samples are taken to lie on the first axis; then the first
        one alone must give the network's first answer.

        Raises:
            CalibrationError: when it gives another one.
        """
        if call.axes is not None or call.batch_size == 1:
            return
        with dry_run(self._trainer, self._module, self._network, None, True):
            whole, again, one = (tensors_in(each.call(self._network)) for each in (call, call, call.first(1)))
        is_random = not all(_same(a, b) for a, b in zip(whole, again, strict=True))
        agreeing = [_is_first(a, b, call.batch_size, is_random) for a, b in zip(one, whole, strict=False)]
        if len(one) != len(whole) or False in agreeing or True not in agreeing:
            raise CalibrationError(
                f"Cannot tell on which axis the samples of a batch lie in the inputs of {self._name!r}, of shapes "
                f"{[tuple(tensor.shape) for tensor in call.tensors]}: the first of {call.batch_size} along the first "
                "axis gives another answer alone. Expected data from a torch DataLoader whose collate_fn and a step "
                "that takes batches of two and of three samples, so that the two can be compared; or batches of one."
            )

    def _with_axes(self, call: NetworkInputs) -> NetworkInputs:
        known = self._axes if self._quantized is None else [*self._axes, self._quantized.inputs.axes]
        fitting = (axes for axes in known if axes is not None and fit((call.args, call.kwargs), axes))
        return replace(call, axes=next(fitting, None))

    def _calls(
        self, batch: Any, batch_idx: int, dataloader_idx: int, learning: bool = False
    ) -> tuple[list[NetworkInputs], list[str]]:
        """Return what the first step that fits calls the network with, or why none fits."""
        failures = []
        for step in list(self._steps):
            run = self._run(step, batch, batch_idx, dataloader_idx)
            if problem := self._problem(run, learning):
                failures.append(f"{step} {problem}")
                continue
            if learning:
                return run.calls[: run.done], []
            if step != self._steps[0]:  # whatever worked is tried first for the next batch
                log.info("The network is called as %s does, since %s.", step, "; ".join(failures))
                self._steps.remove(step)
                self._steps.insert(0, step)
            if self._runs_on and run.error is not None:
                log.info(
                    "%s ended with %s after %d calls of %r: calls after that, if there are any, are not calibrated on.",
                    *(step, f"{type(run.error).__name__}: {run.error}", run.done, self._name),
                )
            self._runs_on = self._runs_on and run.done > 1
            return run.calls[: run.done], []
        return [], failures

    def _unlabeled_calls(self, batch: Any) -> list[NetworkInputs]:
        """Return the calls for a batch of one tensor that no step takes: images without labels.

        The network can take it directly only if the steps, too, pass their images on unchanged. That is checked on the
        data of the running stage; images that a step would have normalized are not the network's input.
        """
        tensors = tensors_in(batch)
        if len(tensors) != 1:
            return []
        if self._plain is None:
            labeled = next(batches(stage_loader(self._trainer)), None)
            labeled = self._to_device(labeled, 0)
            calls = self._calls(labeled, 0, 0)[0]
            given = tensors_in(labeled)
            plain = [len(call.tensors) == 1 and any(_same(call.tensors[0], one) for one in given) for call in calls]
            self._plain = calls if all(plain) else []
        alike = [(call.tensors[0].dim(), call.tensors[0].dtype) for call in self._plain]
        if any(one != (tensors[0].dim(), tensors[0].dtype) for one in alike):
            return []
        return [call.map(lambda _: tensors[0]) for call in self._plain]

    def _to_device(self, batch: Any, dataloader_idx: int) -> Any:
        device = next((p.device for p in self._module.parameters() if not p.is_meta), self._module.device)
        return transferred(self._trainer, self._module, batch, device, dataloader_idx)

    def _problem(self, run: _Run, learning: bool) -> str | None:
        """Return why these calls are invalid, or ``None``: a step may mis-unpack a batch that it was not written for.

        ``images, labels = batch`` takes a bare tensor of two images for a pair, and two loaders' batches as well.
        """
        reason = "" if run.error is None else f"{type(run.error).__name__}: {run.error}"
        if not run.calls:
            return f"raised {reason}" if reason else "did not call it"
        first = run.calls[0]
        if self._quantized is not None:  # as many tensors, of the same ranks, as it was built with
            expected = self._quantized.inputs.ranks
            if all(self._with_axes(call).first(1).ranks != expected for call in run.calls):
                return f"called it with shapes {[tuple(tensor.shape) for tensor in first.tensors]}"
        if run.done == 0:
            return f"called it with what makes it raise {reason}"
        if self._quantized is None and not learning:
            try:
                with dry_run(self._trainer, self._module, self._network, None, True):
                    self._with_axes(first).first(1).call(self._network)
            except Exception as error:
                return f"called it with what makes it raise {type(error).__name__}: {error}"
        return None

    def _run(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> _Run:
        method = getattr(self._module, step)
        # as Lightning passes them: by position, as many as the step takes
        given = [batch] if step == "forward" else [batch, batch_idx, dataloader_idx]
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
        positional = sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds)
        given = given[: max(positional, 2 if inspect.Parameter.VAR_POSITIONAL in kinds else 1)]
        run = _Run()

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # copies: the step may change its tensors afterwards
            run.calls.append(NetworkInputs(args, dict(kwargs)).map(_copied))
            if not self._runs_on:
                run.done = 1
                raise _StopStep

        def end(*_: Any) -> None:
            run.done += 1

        strategy = self._trainer.strategy
        float_network = unrounded(self._quantized) if self._quantized and self._runs_on else nullcontext()
        with dry_run(self._trainer, self._module, self._network, batch, self._runs_on), float_network:
            hooks: list[Any] = [self._network.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)]
            hooks.append(self._network.register_forward_hook(end))
            try:
                if step == "training_step" and not (self._module.automatic_optimization or strategy.optimizers):
                    # a manual step starts with its optimizers, which Lightning makes after setup()
                    make_optimizers(self._trainer)
                method(*given)
            except _StopStep:
                pass
            except Exception as error:
                run.error = error
            finally:
                for hook in hooks:
                    hook.remove()
        return run


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def _is_first(one: Tensor, whole: Tensor, samples: int, is_random: bool) -> bool | None:
    """Whether a tensor is the first sample of another one; ``None`` where the shapes do not compare."""
    if one.dim() != whole.dim() or one.shape == whole.shape:
        return None
    for axis in range(one.dim()):
        part = whole.narrow(axis, 0, min(one.shape[axis], whole.shape[axis]))
        if part.shape == one.shape and whole.shape[axis] == samples * one.shape[axis]:
            scale = float(whole.abs().max()) if whole.numel() else 0.0
            return is_random or bool(((part.double() - one.double()).abs() <= _TOLERANCE * scale).all())
    return None
