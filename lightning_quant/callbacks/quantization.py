"""What both quantization callbacks share: when a network is quantized, and when it is calibrated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_quant.callbacks.calibration import calibration_samples
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import batches, isolated_seed, stage_loader, stage_name, twin_batches
from lightning_quant.callbacks.early_setup import end_early_setup, set_up_early
from lightning_quant.callbacks.float_view import computing_float, without_quantizers
from lightning_quant.callbacks.lightning_internals import averaged_model, callbacks_of, expects_all_gradients
from lightning_quant.callbacks.lightning_packages import AnyCallback
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.measured_precision import Measuring, hook_measuring, precision_notice
from lightning_quant.callbacks.networks import find_network, quantized_networks
from lightning_quant.callbacks.range_groups import RangeGroups, freeze_with_layers
from lightning_quant.callbacks.schedules import show_as_given
from lightning_quant.callbacks.strategy_hooks import hook_strategy
from lightning_quant.callbacks.trainer_checks import (
    averaging_callbacks,
    check_float_network,
    check_synchronized,
    check_trainer,
)
from lightning_quant.callbacks.unreached_ranges import unreached_ranges
from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate, uncalibrated
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs, Passes
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.preflight import refuse, sharing_siblings
from lightning_quant.simulation.range_estimators import RangeEstimator
from lightning_quant.utilities.registry import Spec


def end_fit(trainer: pl.Trainer) -> None:
    """End a fit before its next step, whatever minimum of epochs or steps it has."""
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


class QuantizationCallback(AnyCallback):
    """Base of the quantization callbacks: quantizes the network at ``setup`` and calibrates it once.

    ``setup`` runs before Lightning restores a checkpoint, makes the optimizers and wraps for DDP, so all three see the
    quantized network; only ``configure_optimizers`` sees it without ranges, as in float, which then join the optimizer
    that it made. Calibration runs when the strategy is set up, with the module on its device and a checkpoint restored,
    which may hold the ranges already, and before any callback's ``on_fit_start``.

    Several networks of one module are quantized by one callback each; each calibrates with those before it quantized
    and those after it in float.

    Args and raises: see :class:`PostTrainingQuantization`.
    """

    climbs = False
    refines = False

    def __init__(
        self,
        precision: str | Precision = "w8a8",
        *,
        network: str = "model",
        hardware: str = "htp_v75",
        calibration_samples: int = 256,
        calibration_dataloader: Iterable[Any] | None = None,
        range_estimator: RangeEstimator | Spec = "min_max",
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
        self._frozen_ranges: list[nn.Parameter] = []

    @property
    @override
    def state_key(self) -> str:
        name = self.network_name
        return super().state_key if name == "model" else self._generate_state_key(network=name)

    def quantized_network(self, pl_module: pl.LightningModule) -> QuantizedNetwork:
        """Return the quantized network inside ``pl_module``.

        Raises:
            ConfigurationError: when it is not quantized.
        """
        network = pl_module.get_submodule(self.network_name)
        quantized = QuantizedNetwork.of(network)
        if quantized is None:
            raise ConfigurationError(
                f"network={self.network_name!r} is {type(network).__name__} and not quantized: expected what setup() "
                f"made of it. Does {type(pl_module).__name__} make it again in its own setup() or configure_model()?"
            )
        return quantized

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_trainer(trainer, type(self).__name__)
        for other in quantization_callbacks(trainer):
            if other is not self:
                self._check_beside(other)
        set_up_early(trainer, pl_module, stage)
        network = find_network(pl_module, self.network_name)
        if (known := QuantizedNetwork.of(network)) is not None:
            self._check_same_recipe(known)
        else:
            self._quantize(trainer, pl_module, network)
        check_synchronized(trainer, self.quantized_network(pl_module).network, self.network_name, type(self).__name__)
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
            if (line := precision_notice(trainer, measuring(trainer, pl_module).in_full)) is not None:
                rank_zero_log(line)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module) -> None:
        check_float_network(trainer, pl_module, network, self, self.network_name)
        siblings = sharing_siblings(pl_module, network, self.network_name)
        if self.recipe.strict:
            refuse(siblings)
        for finding in siblings:
            rank_zero_warn(f"{finding.module} {finding.problem}; {finding.remedy}.")
        example, *others = self._examples(trainer, pl_module)
        quantized = quantize(network, example, self.recipe, others)
        quantized.findings[:0] = siblings
        rank_zero_log(f"Quantized {type(pl_module).__name__}.{self.network_name} to {self.recipe.precision}.")

    def _note_ranges(self, trainer: pl.Trainer, quantized: QuantizedNetwork, fits: bool) -> None:
        """Keep which ranges never learn, and freeze those of frozen layers before a strategy looks."""
        if fits and expects_all_gradients(trainer):
            for parameter in unreached_ranges(quantized):
                parameter.requires_grad_(False)
        self._fixed_ranges = [one for one in quantized.range_parameters() if not one.requires_grad]
        self._frozen_ranges = freeze_with_layers(quantized.network) if fits else []

    def _add_ranges(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the ranges to the optimizers, which the user has just made without them."""
        optimizers = trainer.strategy.optimizers
        network = self.quantized_network(pl_module).network
        groups = RangeGroups(optimizers, network, self.network_name, self._fixed_ranges, self._frozen_ranges)
        schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
        for optimizer in optimizers:  # schedulers that are not handed to Lightning may be kept in the module
            show_as_given([*schedulers, *vars(pl_module).values()], optimizer, groups.is_given)
        self._groups = groups

    def _on_set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate, on the module's device and before anything else runs the network."""
        self._hooked.pop_all()  # they have removed themselves
        end_early_setup(pl_module)
        with measuring(trainer, pl_module)():
            self._calibrate_once(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._groups is not None:  # schedulers took their step
            self._groups.follow()

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
        self._groups, self._fixed_ranges, self._frozen_ranges = None, [], []

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
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._measured.close()
        end_early_setup(pl_module)

    def _examples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[NetworkInputs]:
        """Return calls of the network with one sample of the running stage's data, one for each structure of inputs.

        The one with the most tensors comes first: a state that is None at the first call is a tensor at the second.
        """
        catcher = InputCatcher(trainer, pl_module, self.network_name)
        with isolated_seed(), self._others_in_float(trainer, pl_module):
            loader = stage_loader(trainer)
            batch = next(batches(loader), None)
            if batch is None:
                raise CalibrationError(
                    f"The data loader of trainer.{stage_name(trainer)}() gave no batch: expected at least one. Check "
                    "its data set, its sampler and drop_last."
                )
            catcher.learn_axes(twin_batches(loader))
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
            given, samples = self.calibration_dataloader, self.recipe.calibration_samples

            def inputs() -> Iterator[NetworkInputs]:
                with self._others_in_float(trainer, pl_module):
                    yield from calibration_samples(trainer, pl_module, catcher, given, samples, "Calibrating")

            used = calibrate(network, Passes(inputs), cache=self.calibration_cache(trainer))
            if trainer.world_size > 1:  # GPUs may round differently; the ranges must not
                for parameter in network.range_parameters():
                    torch.distributed.broadcast(parameter.data, src=0)
        for callback in averaging_callbacks(trainer):
            if (average := averaged_model(callback)) is not None:
                # a copy made in setup(): without this, ranges that nobody calibrated are validated and saved
                average.get_submodule(self.network_name).load_state_dict(network.network.state_dict())
        rank_zero_log(f"Calibrated {self.network_name} with {used} samples.")
        if network.left_in_float:
            module, operations = next(iter(network.left_in_float.items()))
            rank_zero_warn(
                f"Some samples reached operations that the example of {self.network_name} did not, e.g. "
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


def quantization_callbacks(trainer: pl.Trainer) -> list[QuantizationCallback]:
    """Return the quantization callbacks of a Trainer, one for each network."""
    return [one for one in callbacks_of(trainer) if isinstance(one, QuantizationCallback)]


def callback_of(trainer: pl.Trainer, name: str) -> QuantizationCallback | None:
    """Return the callback that quantizes the network at the dotted attribute ``name``, if there is one."""
    return next((one for one in quantization_callbacks(trainer) if one.network_name == name), None)


def measuring(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Measuring:
    """Return the context for everything whose result is compared or reported, whatever network is measured."""
    refines = trainer.state.fn == "fit" and any(one.refines for one in quantization_callbacks(trainer))
    return Measuring(quantized_networks(pl_module).values(), refines)
