"""From the user's batches to the network's inputs, whatever the batches and the module look like.

How a batch turns into a call of the network is known to the user's own ``validation_step`` (or whichever
step there is) and to nobody else. So a step is run up to the moment it calls the network; the arguments are
caught there and the step is left. Nothing after the call happens: no loss, no metric, no logging.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
import torch.distributed
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork

_STEPS = ("validation_step", "test_step", "predict_step", "training_step", "forward")


class _Caught(BaseException):
    """Leaves the user's step at the network's call. Not an Exception, so ``except Exception`` lets it by."""

    def __init__(self, inputs: NetworkInputs) -> None:
        self.inputs = inputs


class InputCatcher:
    """Turns batches into the calls of a network that the user's own steps make of them.

    Args:
        trainer: the Trainer, for its transfer hooks and device.
        pl_module: the module whose steps are run.
        network: the network inside it, float or quantized.
        name: its dotted attribute, for messages.
        first: the step to try first.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, name: str, first: str = _STEPS[0]
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._network = network
        self._name = name
        steps = [step for step in (first, *_STEPS) if step == "forward" or is_overridden(step, pl_module)]
        self._steps = list(dict.fromkeys(steps))

    def catch(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> NetworkInputs:
        """The first call of the network for ``batch``.

        Raises:
            CalibrationError: when no step of the module gets as far as calling the network.
        """
        batch = self._trainer.strategy.batch_to_device(batch, self._module.device, dataloader_idx)
        failures = []
        for step in list(self._steps):
            try:
                inputs = self._run(step, batch, batch_idx, dataloader_idx)
            except Exception as error:
                failures.append(f"{step} raised {type(error).__name__}: {error}")
                continue
            if inputs is None:
                failures.append(f"{step} did not call it")
            elif problem := self._problem(inputs):
                failures.append(f"{step} called it with {problem}")
            else:
                if step != self._steps[0]:  # whatever worked is tried first for the next batch
                    self._steps.remove(step)
                    self._steps.insert(0, step)
                return inputs
        tensors = tensors_in(batch)
        if len(tensors) == 1:  # unlabelled images: nothing to unpack
            return NetworkInputs((tensors[0],))
        raise CalibrationError(
            f"Could not get from batch {batch_idx} to the network {self._name!r}: {'; '.join(failures)}. Expected "
            f"a step of {type(self._module).__name__} that calls self.{self._name}(...) itself with this batch. "
            "Name the attribute that is called in network=..., or give a calibration_dataloader with batches like "
            "those of validation."
        )

    def _problem(self, inputs: NetworkInputs) -> str | None:
        """Why this is no proper call of the network, if so: a step may take a batch it is not made for apart wrongly.

        ``images, labels = batch`` takes a bare tensor of two images for a pair, and two loaders' batches as well.
        """
        if (known := QuantizedNetwork.of(self._network)) is not None:  # as many tensors, of the same ranks, as then
            expected = [tensor.dim() for tensor in known.inputs.tensors]
            fits = [tensor.dim() for tensor in inputs.tensors] == expected
            return None if fits else f"shapes {[tuple(tensor.shape) for tensor in inputs.tensors]}"
        try:
            with self._untouched(), torch.no_grad():
                inputs.first(1).call(self._network)
        except Exception as error:
            return f"what makes it raise {type(error).__name__}: {error}"
        return None

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """The module in eval mode and without logging; afterwards all is as it was."""
        module, strategy = self._module, self._trainer.strategy
        modes = {part: part.training for part in module.modules()}
        trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
        optimizers = strategy.optimizers
        module.eval()
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log
            strategy.optimizers = optimizers
            for part, training in modes.items():  # one by one: a frozen part is in another mode than the whole
                part.training = training
            for parameter, requires_grad in trainable.items():  # toggle_optimizer() was left halfway
                parameter.requires_grad_(requires_grad)

    def _run(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> NetworkInputs | None:
        method = getattr(self._module, step)
        # as Lightning passes them: by position, as many as the step takes
        given = [batch] if step == "forward" else [batch, batch_idx, dataloader_idx]
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
        positional = sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds)
        given = given[: max(positional, 2 if inspect.Parameter.VAR_POSITIONAL in kinds else 1)]

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Caught(NetworkInputs(args, dict(kwargs)))

        handle = self._network.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        strategy = self._trainer.strategy
        try:
            with self._untouched(), torch.no_grad():
                if step == "training_step" and not (self._module.automatic_optimization or strategy.optimizers):
                    # a manual step starts with its optimizers, which Lightning makes after setup()
                    strategy.optimizers, _ = _init_optimizers_and_lr_schedulers(self._module)
                method(*given)
        except _Caught as caught:
            return caught.inputs.map(Tensor.detach)
        finally:
            handle.remove()
        return None


def stage_loader(trainer: pl.Trainer) -> CombinedLoader:
    """The running stage's own data: where the example for tracing comes from."""
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    stage = stage_name(trainer)
    source, module = loops[stage]._data_source, trainer.lightning_module
    if source.instance is module and is_overridden("setup", module):
        module.setup(stage)  # it may make the data, but Lightning calls it after the callbacks'
    loader = source.dataloader()
    # as the Trainer does it: training combines several loaders in one batch, the others run them one by one
    return _combined(loader) if stage == "fit" else CombinedLoader(loader, "sequential")


def stage_name(trainer: pl.Trainer) -> str:
    """The method of the Trainer that is running: fit, validate, test or predict."""
    assert trainer.state.fn is not None
    return trainer.state.fn.value


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Any) -> Any:
    """The data to calibrate on: given, the data module's calibration loader, or its training data.

    Raises:
        ConfigurationError: when there is neither. Validation data is never taken silently: ranges tuned on it
            would flatter the metric that judges them.
    """
    if given is not None:
        return given() if callable(given) and not isinstance(given, Iterable) else given
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "calibration_dataloader"):
        return datamodule.calibration_dataloader()
    if trainer.state.fn == "fit":
        return trainer.fit_loop._data_source.dataloader()
    for source in (datamodule, pl_module):
        if source is not None and is_overridden("train_dataloader", source):
            if is_overridden("setup", source):
                source.setup("fit")  # data modules make their training set there only
            return source.train_dataloader()
    raise ConfigurationError(
        f"trainer.{stage_name(trainer)}() has no data to calibrate on: expected "
        "calibration_dataloader=... on the callback, a calibration_dataloader() method on the data module, or a "
        "train_dataloader(). Validation data is not used for it."
    )


def calibration_inputs(
    trainer: pl.Trainer, loader: Any, catcher: InputCatcher, samples: int
) -> Iterator[NetworkInputs]:
    """Calls of the network with calibration samples, the same sequence on every rank.

    Each rank reads its share of the data as Lightning would deal it out; the shares are exchanged batch by
    batch. So every rank observes every sample in the same order and comes to the same ranges, whatever the
    range estimator, without any arithmetic on half-finished statistics.

    Args:
        trainer: the Trainer.
        loader: a data loader or a collection of them.
        catcher: turns batches into calls.
        samples: how many samples are wanted over all ranks; reading stops there.
    """
    if trainer.world_size == 1:
        for index, batch in enumerate(batches(loader)):
            if trainer.received_sigterm:  # here Lightning has no loop that would stop
                raise SIGTERMException
            yield catcher.catch(batch, index)
        return
    own = enumerate(batches(_sharded(trainer, loader)))
    seen = 0
    while seen < samples:
        mine = [catcher.catch(batch, index).to(torch.device("cpu")) for index, batch in islice(own, 1)]
        shares: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, mine)
        gathered = [inputs for share in shares for inputs in share]
        if not gathered:
            return
        for inputs in gathered:
            seen += inputs.batch_size
            yield inputs.to(trainer.strategy.root_device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draw the same samples every time, and leave the program's random numbers as they were.

    Without this, adding the callback would change the order of the training data.
    """
    with isolate_rng():
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        yield


def _combined(loader: Any) -> CombinedLoader:
    return loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")


def batches(loader: Any) -> Iterator[Any]:
    """Every batch of a loader or a collection of loaders, the way the Trainer would combine them."""
    combined = _combined(loader)
    owners = [owner for one in combined.flattened for owner in (one, getattr(one, "sampler", None))]
    generators = [g for owner in owners if (g := getattr(owner, "generator", None)) is not None]
    states = [generator.get_state() for generator in generators]
    try:
        for batch, _, _ in combined:
            yield batch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _sharded(trainer: pl.Trainer, loader: Any) -> CombinedLoader:
    """Deal a loader's samples out over the ranks, as Lightning does for its own loops."""
    combined = _combined(loader)
    combined.flattened = [
        trainer._data_connector._prepare_dataloader(
            one, shuffle=_is_dataloader_shuffled(one), mode=RunningStage.TRAINING
        )
        for one in combined.flattened
    ]
    return combined
