"""The samples that the graphs of an export are compared on, and what they gave as a metric takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch

from lightning_quant.callbacks.calibration import calibration_inputs
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_loader, isolated_seed, stage_loader
from lightning_quant.callbacks.device_metric import LabeledBatch, metrics_of
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.quantization import callback_of
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.edges.app import plan_of
from lightning_quant.deploy.edges.host import network_outputs
from lightning_quant.deploy.samples import Samples, Tensors
from lightning_quant.deploy.single_samples import first_samples, single_samples
from lightning_quant.deploy.sizes import InputSize, SizedCalls
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork

# How many times as many samples are looked at for some of the exported size.
LOOKED_AT = 16


def export_samples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    count: int,
    further: Sequence[InputSize] = (),
) -> tuple[list[NetworkInputs], list[NetworkInputs]]:
    """Return samples of the calibration data, one call each.

    Args:
        trainer: whose data is used.
        pl_module: whose step calls the network.
        name: dotted attribute of the network.
        network: the quantized network.
        count: how many samples, at most.
        further: further sizes, whose samples are kept where the data comes to some.

    Returns:
        Those of the size that the network is exported for, and those of the further sizes.
    """
    callback = callback_of(trainer, name)
    given = None if callback is None else callback.calibration_dataloader
    catcher = InputCatcher(trainer, pl_module, name, network)
    with isolated_seed(), torch.inference_mode(False), torch.no_grad():
        try:
            loader = calibration_loader(trainer, pl_module, given)
        except ConfigurationError:  # nothing is calibrated here: to compare, any data will do
            loader = stage_loader(trainer)
        among = max(LOOKED_AT * count, network.recipe.calibration_samples)
        sizes: dict[str, list[NetworkInputs]] = {}

        def noted() -> Iterator[NetworkInputs]:
            for call in calibration_inputs(trainer, loader, catcher, among):
                if call.ranks == network.inputs.ranks:
                    shapes = str([tuple(tensor.shape) for tensor in call.first(1).tensors])
                    kept = sizes.setdefault(shapes, [])
                    if further and len(kept) < count:
                        kept += list(single_samples(call))[: count - len(kept)]
                yield call

        found = first_samples(noted(), count, network.inputs, among)
        shapes = [tuple(tensor.shape) for tensor in found[0].tensors]
        if len(sizes) > 1:
            also = "" if further else ", and compared on those alone"
            rank_zero_log(f"Inputs come in {len(sizes)} or more sizes: exported for {shapes}{also}.")
        others = [call for size, kept in sizes.items() if size != str(shapes) for call in kept]
        return found, others


def samples_of_graphs(
    network: QuantizedNetwork, bundle: Bundle, calls: Sequence[NetworkInputs], sized: Mapping[str, SizedCalls]
) -> dict[str, Samples]:
    """Return what each graph of a bundle is given, and its outputs are compared with; the network's own is ``""``.

    Args:
        network: the quantized network.
        bundle: it was exported to.
        calls: of the network's own size, one sample each.
        sized: of the further sizes.
    """
    found = {"": Samples.of(network, bundle.manifest, calls)}
    for name, graph in bundle.graphs.items():
        size = name.removesuffix("app").rstrip(".") if graph.edged else name
        given = sized[size].calls if size else calls
        found[name] = Samples.of(network, bundle.manifest, given, plan_of(graph))
    return found


def metrics_of_graph(
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    monitor: str,
    labeled: Sequence[LabeledBatch],
    graph: Bundle,
    outputs: Sequence[Tensors],
    samples: Samples,
) -> dict[str, float]:
    """Compute ``monitor`` as :func:`~lightning_quant.callbacks.device_metric.metrics_of` does, for a graph of a bundle.

    Of a graph with edges all three are given to the user's validation as an app gets them, as scores of 0 and 1 for a
    class, say: so they can be compared with each other, whatever the metric is. Of what a module of the user's own
    gives there is no metric, with a word in the log.

    Args:
        pl_module: the user's module.
        name: dotted attribute of the network in it.
        network: the quantized network.
        monitor: name of the logged metric.
        labeled: the samples with their labels.
        graph: the graph that the device ran.
        outputs: what the device computed.
        samples: what it was given, with the outputs of simulation and float network.
    """
    if (app := graph.manifest.app) is not None and graph.edged and app.edges.has_modules:
        rank_zero_log("No metric of the graph with edges: what your own module gives is not what the network returns.")
        return {}
    plan = plan_of(graph)
    if plan is None:
        return metrics_of(pl_module, name, network, monitor, labeled, outputs)
    known = {"float": samples.float_network, "simulation": samples.simulation}
    references = {what: [network_outputs(plan, one) for one in given] for what, given in known.items() if given}
    device = [network_outputs(plan, one) for one in outputs]
    return metrics_of(pl_module, name, network, monitor, labeled, device, references)
