"""The user's own validation metric of what a device computed, on the few samples it computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_quant.callbacks.data import InputCatcher, batches, stage_loader
from lightning_quant.callbacks.measuring import in_place_of
from lightning_quant.callbacks.traces import leaving_no_trace
from lightning_quant.deploy.bundle import single_samples
from lightning_quant.deploy.samples import Tensors
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.inputs import NetworkInputs, with_tensors
from lightning_quant.simulation.network import QuantizedNetwork


@dataclass
class LabelledBatch:
    """A batch of validation data, cut to a few samples.

    Args:
        batch: as the user's ``validation_step`` takes it.
        calls: the network's calls for it, one sample each, on the CPU.
    """

    batch: Any
    calls: list[NetworkInputs]


def first_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: QuantizedNetwork, name: str, samples: int
) -> list[LabelledBatch]:
    """The first ``samples`` samples of the validation data; none where there is no such data.

    Where the trainer tests, it is the test data: it is what the user looks at then.
    """
    if trainer.state.fn == "fit":
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if not (source.is_defined() and trainer.enable_validation):
            return []
        loader = source.dataloader()
    else:
        loader = stage_loader(trainer)
    catcher = InputCatcher(trainer, pl_module, network, name)
    found: list[LabelledBatch] = []
    wanted = samples
    for index, batch in enumerate(batches(loader)):
        size = catcher.catch(batch, index).batch_size
        cut = apply_to_collection(batch, Tensor, _first, size, wanted)
        try:
            call = catcher.catch(cut, index).to(torch.device("cpu"))
        except CalibrationError:  # cut apart it is no batch any more
            return []
        found.append(LabelledBatch(cut, list(single_samples(call))))
        wanted -= len(found[-1].calls)
        if wanted <= 0:
            break
    return found


def _first(tensor: Tensor, size: int, wanted: int) -> Tensor:
    return tensor[:wanted] if tensor.dim() > 0 and tensor.shape[0] == size else tensor


class _Playback(nn.Module):
    """Answers with recorded outputs, one sample after the other, whatever it is asked."""

    def __init__(self, outputs: Sequence[Tensors], network: QuantizedNetwork) -> None:
        super().__init__()
        self._outputs = iter(outputs)
        self._network = (network,)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = NetworkInputs(args, kwargs).batch_size
        rows = [list(next(self._outputs).values()) for _ in range(count)]
        tensors = [torch.cat([torch.from_numpy(row[i]) for row in rows]) for i in range(len(rows[0]))]
        return with_tensors(self._network[0].output_structure, tensors)


def metrics_of(
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    monitor: str,
    labelled: Sequence[LabelledBatch],
    outputs: Sequence[Tensors],
) -> dict[str, float]:
    """The metric ``monitor`` of the ``float`` network, the ``simulation`` and the ``device`` on the same samples.

    Args:
        pl_module: the user's module; its ``validation_step`` computes the metric.
        name: dotted attribute of the network in it.
        network: the quantized network.
        monitor: name of the logged metric.
        labelled: the samples with their labels.
        outputs: what the device computed of each sample, in order; of some it may have computed none.

    Returns:
        What could be measured; nothing if validation does not log the metric.
    """
    kept = []
    left = len(outputs)
    for one in labelled:  # whole batches only: the labels of half a batch belong to nothing
        if len(one.calls) > left:
            break  # a smaller one after it would be given the outputs of this one
        kept.append(one.batch)
        left -= len(one.calls)
    if not kept:
        return {}
    candidates = {"float": network.float_network, "simulation": network, "device": _Playback(outputs, network)}
    found = {}
    for what, candidate in candidates.items():
        if candidate is None:
            continue
        try:
            value = _validate(pl_module, name, candidate, kept).get(monitor)
        except Exception as error:  # the user's validation, outside of its own Trainer
            rank_zero_warn(f"{monitor} of the device's outputs could not be computed: {type(error).__name__}: {error}")
            return {}
        if value is None:
            return {}
        found[what] = float(value)
    return found


def _validate(pl_module: pl.LightningModule, name: str, network: nn.Module, kept: list[Any]) -> dict[str, Any]:
    """Validate with another network and a Trainer of its own: the running one is at its end, or amid a fit."""
    owner = pl_module._trainer
    modes = {module: module.training for module in pl_module.modules()}
    device = pl_module.device
    greetings = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = greetings.level
    greetings.setLevel(logging.WARNING)  # the user's own Trainer has said it all
    try:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        in_place = in_place_of(pl_module, name, network.cpu().eval())
        # a metric that remembers would take the best of one candidate to the next
        with torch.inference_mode(False), in_place, leaving_no_trace([pl_module], network):
            trainer.validate(pl_module, DataLoader(kept, batch_size=None), verbose=False)  # type: ignore[arg-type]
        return dict(trainer.callback_metrics)
    finally:
        greetings.setLevel(level)
        pl_module.to(device)
        pl_module._trainer = owner
        for module, training in modes.items():
            module.training = training
