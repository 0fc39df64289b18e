"""What both quantization callbacks share: when the simulation goes in, and when it is calibrated."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import (
    batches,
    calibration_inputs,
    calibration_loader,
    stage_loader,
    stage_name,
    twins,
    undisturbed,
)
from lightning_quant.callbacks.early_setup import end_early_setup, set_up_early
from lightning_quant.callbacks.float_view import computing_float, without_quantizers
from lightning_quant.callbacks.lightning_package import check_trainer_package
from lightning_quant.callbacks.measured_precision import Measuring, hook_measuring, told
from lightning_quant.callbacks.progress import progress
from lightning_quant.callbacks.range_groups import RangeGroups
from lightning_quant.callbacks.schedules import show_as_given
from lightning_quant.callbacks.strategy_hooks import hook_strategy
from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate, uncalibrated
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs, Passes, counted, take_samples
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.preflight import refuse, sharing_siblings
from lightning_quant.simulation.range_estimators import RangeEstimator, RangeEstimatorSpec

# Below Lightning's own logger, so that what a run says appears where Lightning's messages do.
log = logging.getLogger(f"lightning.pytorch.{__name__}")

_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_STRATEGIES = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


@rank_zero_only
def say(message: str) -> None:
    """Tell the user what a callback did, once whatever the number of processes."""
    log.info(message)


def end_fit(trainer: pl.Trainer) -> None:
    """End a fit before its next step, whatever minimum of epochs or steps it has."""
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def averaging(trainer: pl.Trainer) -> Callback | None:
    """The callback that averages weights, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, _AVERAGING)), None)


class QuantizationCallback(Callback):
    """Base of the quantization callbacks: puts the simulation in at ``setup`` and calibrates it once.

    ``setup`` runs before Lightning restores a checkpoint, makes the optimizers and wraps for DDP, so the
    quantized network is what all three see; only ``configure_optimizers`` sees it without ranges, as in float, and they
    join the optimizer that it made. Calibration waits for the strategy's setup to be over, when the device is there and
    a restored checkpoint has said whether ranges are known already, and comes before any callback's ``on_fit_start``.

    Several networks of one module are quantized by a callback for each; each calibrates with those before it quantized
    and those after it in float.

    Args and raises: see :class:`PostTrainingQuantization`.
    """

    climbs = False
    refines = False

    def __init__(
        self,
        precision: str | Precision = "w8a8",
        network: str = "model",
        hardware: str = "htp_v75",
        calibration_samples: int = 256,
        calibration_dataloader: Iterable[Any] | None = None,
        range_estimator: RangeEstimator | RangeEstimatorSpec = "min_max",
        overrides: Mapping[str, str] | None = None,
        strict: bool = False,
        statistics_cache: str | None = None,
    ) -> None:
        self.recipe = QuantRecipe(
            precision=Precision.parse(precision),
            hardware=hardware,
            calibration_samples=calibration_samples,
            range_estimator=RangeEstimator.parse(range_estimator),
            overrides={glob: Precision.parse(value) for glob, value in (overrides or {}).items()},
            strict=strict,
        )
        if not isinstance(network, str) or not network:
            raise ConfigurationError(
                f"network={network!r}: expected the name of the attribute of your LightningModule that holds "
                "the float nn.Module, e.g. 'model' or 'net.backbone'."
            )
        self.network_name = network
        self.calibration_dataloader = calibration_dataloader
        self.statistics_cache = statistics_cache
        self._held = ExitStack()
        self._hooked = ExitStack()
        self._measured = ExitStack()
        self._groups: RangeGroups | None = None
        self._fixed_ranges: list[nn.Parameter] = []

    @property
    @override
    def state_key(self) -> str:
        name = self.network_name
        return super().state_key if name == "model" else self._generate_state_key(network=name)

    def quantized_network(self, pl_module: pl.LightningModule) -> QuantizedNetwork:
        """The quantized network inside ``pl_module``."""
        network = pl_module.get_submodule(self.network_name)
        quantized = QuantizedNetwork.of(network)
        if quantized is None:
            raise ConfigurationError(
                f"network={self.network_name!r} is {type(network).__name__} and not quantized: expected what setup() "
                f"made of it. Does {type(pl_module).__name__} make it anew in its own setup() or configure_model()?"
            )
        return quantized

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_trainer_package(trainer, type(self).__name__)
        self._check_trainer(trainer)
        set_up_early(trainer, pl_module, stage)
        network = find_network(pl_module, self.network_name)
        if (known := QuantizedNetwork.of(network)) is not None:
            self._check_same_recipe(known)
        else:
            self._quantize(trainer, pl_module, network)
        self._check_synchronised(trainer, pl_module)
        self._hooked.close()  # of a run that ended early
        unhook = hook_strategy(
            trainer.strategy,
            while_optimizers_are_made=lambda: without_quantizers(self.quantized_network(pl_module).network),
            optimizers_are_made=lambda: self._add_ranges(trainer, pl_module),
            all_is_set_up=lambda: self._on_set_up(trainer, pl_module),
        )
        self._hooked.callback(unhook)
        self._measured.close()
        if self is quantization_callbacks(trainer)[-1]:  # one for all, now that every network is there
            self._measured.callback(hook_measuring(trainer.precision_plugin, measuring(trainer, pl_module)))
            if (line := told(trainer, measuring(trainer, pl_module).in_full)) is not None:
                say(line)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module) -> None:
        self._check_first_time(trainer, pl_module)
        siblings = sharing_siblings(pl_module, network, self.network_name)
        if self.recipe.strict:
            refuse(siblings)
        for finding in siblings:
            rank_zero_warn(f"{finding.module} {finding.problem}; {finding.remedy}.")
        example, *others = self._examples(trainer, pl_module)
        quantized = quantize(network, example, self.recipe, others)
        quantized.findings[:0] = siblings
        say(f"Quantized {type(pl_module).__name__}.{self.network_name} to {self.recipe.precision}.")

    def _add_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the ranges to the optimizers, which the user has just made without them."""
        optimizers = trainer.strategy.optimizers
        network = self.quantized_network(pl_module).network
        groups = RangeGroups(optimizers, network, self.network_name, self._fixed_ranges)
        schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
        for optimizer in optimizers:  # schedulers that are not handed to Lightning may be kept in the module
            show_as_given([*schedulers, *vars(pl_module).values()], optimizer, groups.is_given)
        self._groups = groups

    def _on_set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate, now that all is at its place and before anything runs the network."""
        self._hooked.pop_all()  # they are off
        end_early_setup(pl_module)
        with measuring(trainer, pl_module)():
            self._calibrate_once(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._groups is not None:
            self._groups.follow()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._groups is not None:  # schedulers took a last step
            self._groups.follow()
        self._groups, self._fixed_ranges = None, []

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_weights(pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._held.close()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_weights(pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._held.close()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_weights(pl_module)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._held.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._held.close()
        self._hooked.close()
        self._measured.close()
        self._groups, self._fixed_ranges = None, []
        end_early_setup(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._measured.close()
        end_early_setup(pl_module)

    def _examples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[NetworkInputs]:
        """Calls of the network with one sample, from the data of the running stage: one for each structure of inputs.

        That with the most tensors is the first: a state that is None at the first call is a tensor at the second.
        """
        catcher = InputCatcher(trainer, pl_module, self.network_name)
        with undisturbed(), self._others_in_float(trainer, pl_module):
            loader = stage_loader(trainer)
            batch = next(batches(loader), None)
            if batch is None:
                raise CalibrationError(
                    f"The data loader of trainer.{stage_name(trainer)}() gave no batch: expected at least one. Check "
                    "its data set, its sampler and drop_last."
                )
            catcher.learn_axes(twins(loader))
            calls = catcher.catch(batch, 0)
            catcher.check_axes(calls[0])
            calls = [replace(call.first(1), last=True) for call in calls]
        structures: dict[str, NetworkInputs] = {}
        for call in calls:
            structures.setdefault(str(call.structure()), call)
        return sorted(structures.values(), key=lambda call: -len(call.tensors))

    @contextmanager
    def _others_in_float(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Let the other networks of the module that have no ranges yet compute in float."""
        known = quantized_networks(pl_module)
        others = {one.network_name for one in quantization_callbacks(trainer) if one is not self} & known.keys()
        with ExitStack() as off:
            for name in others:
                if not known[name].calibrated:
                    off.enter_context(computing_float(known[name].network))
            yield

    def _hold_weights(self, pl_module: pl.LightningModule) -> None:
        """Quantize each weight once until the loop that starts is over."""
        network = QuantizedNetwork.of(pl_module.get_submodule(self.network_name))
        if network is not None:
            self._held.enter_context(network.cached_weights())

    def _calibrate_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = self.quantized_network(pl_module)
        if network.calibrated:
            return
        catcher = InputCatcher(trainer, pl_module, self.network_name, network)
        # validation runs under inference_mode, whose tensors would break training later
        with torch.inference_mode(False), torch.no_grad():
            samples = self.recipe.calibration_samples

            def inputs() -> Iterator[NetworkInputs]:
                others = self._others_in_float(trainer, pl_module)
                with undisturbed(), others, progress(trainer, "Calibrating", samples) as advance:
                    loader = calibration_loader(trainer, pl_module, self.calibration_dataloader)
                    calls = calibration_inputs(trainer, loader, catcher, samples)
                    for new, call in counted(take_samples(calls, samples)):
                        yield call
                        advance(new)

            used = calibrate(network, Passes(inputs), cache=self.calibration_cache(trainer))
            if trainer.world_size > 1:  # GPUs may round differently; the ranges must not
                for parameter in network.range_parameters():
                    torch.distributed.broadcast(parameter.data, src=0)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _AVERAGING) and callback._average_model is not None:
                # a copy made in setup(): without this, ranges that nobody calibrated are validated and saved
                average = getattr(callback._average_model, "module", callback._average_model)
                average.get_submodule(self.network_name).load_state_dict(network.network.state_dict())
        say(f"Calibrated {self.network_name} with {used} samples.")
        if network.left_in_float:
            module, operations = next(iter(network.left_in_float.items()))
            rank_zero_warn(
                f"Some samples came to operations that the example of {self.network_name} did not, e.g. "
                f"{', '.join(operations)} in {module or 'the network itself'}: they compute in float, and the exported "
                "file has the other branch. Put the first batch of validation in order, or quantize a part without "
                "control flow that depends on values."
            )
        if missing := uncalibrated(network):
            rank_zero_warn(
                f"No calibration sample reached {len(missing)} quantizers, e.g. {missing[0]!r}: these parts of "
                "the network did not run. They will fail when they do; calibrate with data that uses them."
            )

    def calibration_cache(self, trainer: pl.Trainer) -> StatisticsCache | None:
        """Return the cache that was asked for; ``None`` where samples cannot be read twice, or processes share them."""
        if self.statistics_cache is None or trainer.world_size > 1 or isinstance(self.calibration_dataloader, Iterator):
            return None
        return StatisticsCache(self.statistics_cache)

    def _check_same_recipe(self, network: QuantizedNetwork) -> None:
        mine, theirs = self.recipe.identity(), network.recipe.identity()
        for name, value in mine.items():
            if theirs[name] != value:
                raise ConfigurationError(
                    f"The network {self.network_name!r} is already quantized with {name}={theirs[name]!r}, but "
                    f"{type(self).__name__} was given {name}={value!r}. Start from the float module, or give the "
                    "callback the same values."
                )

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        mine = type(self).__name__
        if isinstance(trainer.strategy, _STRATEGIES):
            raise ConfigurationError(
                f"{type(trainer.strategy).__name__} with {mine}: expected a strategy that keeps parameters whole. "
                "Use strategy='ddp' or a single device."
            )
        if trainer.precision not in _PRECISIONS:
            raise ConfigurationError(
                f"Trainer(precision={trainer.precision!r}) with {mine}: expected one of {', '.join(_PRECISIONS)}. "
                "The simulation keeps weights and ranges in float32; 'bf16-mixed' gives the speed of bfloat16."
            )
        for other in quantization_callbacks(trainer):
            if other is not self:
                self._check_beside(other)

    def _check_synchronised(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what would take the quantizers of batch norms away: Lightning exchanges the modules after this."""
        if trainer.state.fn != "fit" or getattr(trainer.strategy, "_layer_sync", None) is None:
            return
        network = self.quantized_network(pl_module).network
        left = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
        if left:
            raise ConfigurationError(
                f"Trainer(sync_batchnorm=True) with {type(self).__name__}: Lightning would replace {len(left)} batch "
                f"norms of {self.network_name!r}, e.g. {left[0]!r}, by others without quantizers. Expected "
                "sync_batchnorm=False. Batch norms that were folded have nothing to synchronise any more; those that "
                "could not be, synchronise by themselves if your module makes them nn.SyncBatchNorm in its __init__."
            )

    def _check_beside(self, other: QuantizationCallback) -> None:
        """Refuse another quantization callback, unless both together have one meaning."""
        mine, theirs, name, of_other = type(self).__name__, type(other).__name__, self.network_name, other.network_name
        both = f"{mine} and {theirs} in one Trainer"
        if name == of_other:
            raise ConfigurationError(
                f"{both}: expected one quantization callback for {name!r}. QuantizationAwareTraining calibrates by "
                "itself; remove the other."
            )
        if f"{name}.".startswith(f"{of_other}.") or f"{of_other}.".startswith(f"{name}."):
            raise ConfigurationError(
                f"{both} for {name!r} and {of_other!r}, of which one is a part of the other: expected networks that "
                "are apart. Quantize the whole, with overrides={...} for other precisions in a part."
            )
        if type(self) is not type(other):
            raise ConfigurationError(
                f"{both} for {name!r} and {of_other!r}, of which one ends the fit where the other one trains. Use "
                "QuantizationAwareTraining for both; train_ranges=False keeps the ranges as calibrated."
            )
        if self.climbs or other.climbs:
            raise ConfigurationError(
                f"{both} for {name!r} and {of_other!r} with max_drop or rungs: expected neither, since a metric is "
                "the result of both networks. Climb with one first, and quantize the other in a second fit."
            )

    def _check_first_time(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What would run with, or keep, the float network."""
        mine = type(self).__name__
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        early = next((one for one in before if isinstance(one, _AVERAGING)), None)
        if early is not None:
            raise ConfigurationError(
                f"{type(early).__name__} is listed before {mine}: it would average the float network, whose "
                f"weights have other shapes. List {mine} first in callbacks=[...]."
            )
        if pl_module._compiler_ctx is not None:
            raise ConfigurationError(
                f"torch.compile() of {type(pl_module).__name__} with {mine}: expected it uncompiled, since "
                "quantization changes the network. Pass the module itself to the Trainer; "
                "QuantizationAwareTraining(compile=True) compiles the quantized network."
            )
        network = find_network(pl_module, self.network_name)
        for name, module in network.named_modules():
            if module._compiled_call_impl is not None:
                raise ConfigurationError(
                    f"{f'{self.network_name}.{name}'.rstrip('.')}.compile() with {mine}: expected it uncompiled, since "
                    "quantization changes the network. Leave the call away; "
                    "QuantizationAwareTraining(compile=True) compiles the quantized network."
                )


def quantization_callbacks(trainer: pl.Trainer) -> list[QuantizationCallback]:
    """The quantization callbacks of a Trainer, one for each network."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if isinstance(one, QuantizationCallback)]


def callback_of(trainer: pl.Trainer, name: str) -> QuantizationCallback | None:
    """The callback that quantizes the network at the dotted attribute ``name``, if there is one."""
    return next((one for one in quantization_callbacks(trainer) if one.network_name == name), None)


def quantized_networks(pl_module: pl.LightningModule) -> dict[str, QuantizedNetwork]:
    """The quantized networks of a module, by the dotted attribute."""
    return dict(QuantizedNetwork.named_in(pl_module))


def measuring(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Measuring:
    """What everything runs in whose result is compared or reported; also for another network in the place of one."""
    refines = trainer.state.fn == "fit" and any(one.refines for one in quantization_callbacks(trainer))
    return Measuring(quantized_networks(pl_module).values(), refines)


def find_network(pl_module: pl.LightningModule, name: str) -> nn.Module:
    """The module at the dotted attribute ``name``."""
    owner: Any = pl_module
    for part in name.split("."):
        if not hasattr(owner, part):
            known = [key for key, _ in owner.named_children()] if isinstance(owner, nn.Module) else []
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"network={name!r}: {type(owner).__name__} has no attribute {part!r}; expected one of its modules: "
                f"{', '.join(known) or 'it has none'}.{hint} (It may be made in __init__, setup or configure_model.)"
            )
        owner = getattr(owner, part)
    if not isinstance(owner, nn.Module):
        raise ConfigurationError(
            f"network={name!r} is {type(owner).__name__}: expected an nn.Module. Name the attribute of "
            f"{type(pl_module).__name__} that holds the network."
        )
    if hasattr(owner, "_orig_mod"):
        raise ConfigurationError(
            f"network={name!r} was compiled: expected the plain nn.Module, since quantization changes it. Leave "
            "torch.compile() away; QuantizationAwareTraining(compile=True) compiles the quantized network."
        )
    if isinstance(owner, pl.LightningModule):
        raise ConfigurationError(
            f"network={name!r} is a LightningModule: expected the plain nn.Module inside it, without metrics and "
            f"losses, e.g. network='{name}.model'."
        )
    return owner
