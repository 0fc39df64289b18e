"""The samples that the graphs of an export are compared on, and what they gave as a metric takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch

from lightning_quant.callbacks.calibration import calibration_inputs
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_loader, isolated_seed, stage_loader
from lightning_quant.callbacks.device_metric import LabeledBatch, NoMetricError, metrics_of
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.quantization import callback_of
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.edges.app import plan_of
from lightning_quant.deploy.edges.host import network_outputs
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.single_samples import first_samples, single_samples
from lightning_quant.deploy.sizes import InputSize, SizedCalls
from lightning_quant.deploy.targets.target import Measured
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.monitor import Monitor

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


def note_metric(
    measured: Measured,
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    metric: Monitor,
    labeled: Sequence[LabeledBatch],
    graph: Bundle,
    samples: Samples,
) -> None:
    """Write the user's metric of a device's outputs into its report, or why there is none.

    Of a graph with edges all three are given to the user's validation as an app gets them, as scores of 0 and 1 for a
    class, say: so they can be compared with each other, whatever the metric is. Of what a module of the user's own
    gives there is no metric.

    Args:
        measured: the report, and what the device computed.
        pl_module: the user's module.
        name: dotted attribute of the network in it.
        network: the quantized network.
        metric: the logged metric.
        labeled: the samples with their labels.
        graph: the graph that the device ran.
        samples: what it was given, with the outputs of simulation and float network.
    """
    app, outputs = graph.manifest.app, measured.outputs or ()
    plan = plan_of(graph)
    references = None
    try:
        if app is not None and graph.edged and app.edges.has_modules:
            raise NoMetricError("what your own module gives is not what the network returns")
        if plan is not None:
            known = {"float": samples.float_network, "simulation": samples.simulation}
            references = {what: [network_outputs(plan, one) for one in given] for what, given in known.items() if given}
            outputs = [network_outputs(plan, one) for one in outputs]
        found = metrics_of(pl_module, name, network, metric.name, labeled, outputs, references)
        measured.report.metric, measured.report.monitor, measured.report.mode = found, metric.name, metric.mode
    except NoMetricError as error:
        what = "the graph with edges" if graph.edged else "the outputs"
        measured.report.warnings.append(f"No metric of {what}: {error}.")
    measured.write()
