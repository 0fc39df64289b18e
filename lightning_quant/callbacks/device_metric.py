"""The user's own validation metric from a device's outputs, on the few samples that it computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import batches, stage_loader, twin_batches
from lightning_quant.callbacks.lightning_internals import own_trainer_kept, validation_dataloaders_of_fit
from lightning_quant.callbacks.lightning_packages import of_package
from lightning_quant.callbacks.restored_state import restored_state
from lightning_quant.callbacks.validation import swapped_network
from lightning_quant.deploy.samples import Tensors
from lightning_quant.deploy.single_samples import single_samples
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.batch_axes import NoBatchAxisError, cut, find_axes, fit
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in, with_tensors
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import preserve_modes


class NoMetricError(Exception):
    """The user's validation does not give the metric of a device's outputs; the message says why."""


@dataclass
class LabeledBatch:
    """A batch of validation data, cut to a few samples.

    Args:
        batch: as the user's ``validation_step`` takes it.
        calls: the network's calls for it, one sample each, on the CPU.
    """

    batch: Any
    calls: list[NetworkInputs]


def first_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: QuantizedNetwork,
    name: str,
    samples: int,
    like: NetworkInputs,
    among: int,
) -> tuple[list[LabeledBatch], bool]:
    """Return the first ``samples`` validation samples of the exported size; none where there are none.

    While the Trainer tests, they come from the test data.

    Args:
        trainer: whose data it is.
        pl_module: whose steps turn it into calls.
        network: the quantized network.
        name: its dotted attribute.
        samples: how many are wanted.
        like: one sample of the size that was exported.
        among: look no further than this number of samples.

    Returns:
        The batches, and whether there were some of another size.
    """
    if trainer.state.fn == "fit":
        loader = validation_dataloaders_of_fit(trainer)
        if loader is None:
            return [], False
    else:
        loader = stage_loader(trainer)
    catcher = InputCatcher(trainer, pl_module, name, network)
    found: list[LabeledBatch] = []
    wanted, others = samples, False
    axes = None
    with suppress(NoBatchAxisError, ValueError):
        axes = find_axes(*twin_batches(loader))
    for index, batch in enumerate(batches(loader)):
        size = max(call.batch_size for call in catcher.catch(batch, index))
        if axes is not None and fit(batch, axes):
            part = cut(batch, axes, 0, wanted)
        else:
            part = apply_to_collection(batch, Tensor, _first, size, wanted)
        try:
            calls = [call.to(torch.device("cpu")) for call in catcher.catch(part, index)]
        except CalibrationError:  # it cannot be cut into samples
            return [], False
        if len(calls) > 1:  # a state comes from the device itself: its answers cannot be played back
            return [], False
        one = LabeledBatch(part, list(single_samples(calls[0])))
        if all(call.has_sizes_of(like) for call in one.calls):
            found.append(one)
            wanted -= len(one.calls)
        else:
            others = True
        among -= len(one.calls)
        if wanted <= 0 or among <= 0:
            break
    return found, others


def _first(tensor: Tensor, size: int, wanted: int) -> Tensor:
    return tensor[:wanted] if tensor.dim() > 0 and tensor.shape[0] == size else tensor


class _Playback(nn.Module):
    """Return recorded outputs, one sample after the other, whatever the input."""

    def __init__(self, outputs: Sequence[Tensors], network: QuantizedNetwork) -> None:
        super().__init__()
        self._outputs = iter(outputs)
        self._network = (network,)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        network = self._network[0]
        call = NetworkInputs(args, kwargs).batched_like(network.inputs)
        rows = [list(next(self._outputs).values()) for _ in range(call.batch_size)]
        shapes = [answer.shape for answer in tensors_in(call.call(network.network))]
        tensors = [_joined([torch.from_numpy(row[i]) for row in rows], shape) for i, shape in enumerate(shapes)]
        return with_tensors(network.output_structure, tensors)


def _joined(samples: list[Tensor], shape: torch.Size) -> Tensor:
    """Concatenate samples to a batch of a shape, on the axis in which they differ from it; the first if resized."""
    if sum(one != all_ for one, all_ in zip(samples[0].shape, shape, strict=True)) > 1:
        return torch.cat(samples)
    axes = (axis for axis, (one, all_) in enumerate(zip(samples[0].shape, shape, strict=True)) if one != all_)
    return torch.cat(samples, next(axes, 0))


def metrics_of(
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    monitor: str,
    labeled: Sequence[LabeledBatch],
    outputs: Sequence[Tensors],
    references: Mapping[str, Sequence[Tensors]] | None = None,
) -> dict[str, float]:
    """Compute ``monitor`` of the ``float`` network, the ``simulation`` and the ``device`` on the same samples.

    Args:
        pl_module: the user's module; its ``validation_step`` computes the metric.
        name: dotted attribute of the network in it.
        network: the quantized network.
        monitor: name of the logged metric.
        labeled: the samples with their labels.
        outputs: what the device computed of each sample, in order; of some it may have computed none.
        references: what ``float`` and ``simulation`` are taken to have computed, likewise. Default: they are run.

    Raises:
        NoMetricError: if validation does not log the metric, or fails, or no whole batch was computed.
    """
    kept = []
    left = len(outputs)
    for one in labeled:  # whole batches only: labels cannot be cut
        if len(one.calls) > left:
            break  # a smaller one after it would be given the outputs of this one
        kept.append(one.batch)
        left -= len(one.calls)
    if not kept:
        raise NoMetricError(
            "no batch of validation samples was computed as a whole" if labeled else "there are no validation samples"
        )
    candidates: dict[str, nn.Module | None] = {"float": network.float_network, "simulation": network.network}
    if references is not None:
        candidates = {what: _Playback(given, network) for what, given in references.items()}
    candidates["device"] = _Playback(outputs, network)
    found = {}
    for what, candidate in candidates.items():
        if candidate is None:
            continue
        try:
            logged = _validate(pl_module, name, candidate, kept)
        except Exception as error:  # the user's validation, outside of its own Trainer
            raise NoMetricError(f"your validation failed: {type(error).__name__}: {error}") from error
        if monitor not in logged:
            raise NoMetricError(
                f"{monitor} is not among what validation logs, {', '.join(sorted(logged)) or 'nothing'}"
            )
        found[what] = float(logged[monitor])
    return found


def _validate(pl_module: pl.LightningModule, name: str, network: nn.Module, kept: list[Any]) -> dict[str, Any]:
    """Validate another network with a separate Trainer: the running one is in the middle of its own stage."""
    device = pl_module.device
    greetings = rank_zero_module.log
    level = greetings.level
    greetings.setLevel(logging.WARNING)  # the user's own Trainer has logged them
    try:
        with own_trainer_kept(pl_module), preserve_modes(pl_module):
            trainer = of_package(pl_module, pl.Trainer)(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
            in_place = swapped_network(pl_module, name, network.cpu().eval())
            # a metric that remembers would take the best of one candidate to the next
            with torch.inference_mode(False), in_place, restored_state([pl_module], network):
                trainer.validate(pl_module, DataLoader(kept, batch_size=None), verbose=False)  # type: ignore[arg-type]
            return dict(trainer.callback_metrics)
    finally:
        greetings.setLevel(level)
        pl_module.to(device)
