"""Export at the end of a run, and measurement on a device, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.callbacks.device_bounds import DeviceBounds
from lightning_quant.callbacks.device_metric import first_batches
from lightning_quant.callbacks.export_samples import LOOKED_AT, export_samples, note_metric, samples_of_graphs
from lightning_quant.callbacks.lightning_internals import callbacks_of
from lightning_quant.callbacks.lightning_packages import AnyCallback
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.networks import quantized_networks
from lightning_quant.callbacks.off_the_npu import report_off_the_npu
from lightning_quant.callbacks.progress import progress
from lightning_quant.callbacks.quantization import QuantizationCallback, measuring
from lightning_quant.callbacks.reporting import blame_layers, write_callback_report
from lightning_quant.callbacks.visualizer import class_labels
from lightning_quant.deploy.blame.result import Blame, explanations
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.edges.app import check_edges
from lightning_quant.deploy.edges.spec import Edges
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push, device_folder
from lightning_quant.deploy.sizes import InputSize, Size, check_sizes, sized_calls
from lightning_quant.deploy.targets.target import REPORT_NAME, Target
from lightning_quant.errors import ConfigurationError, DeviceBoundError, LightningQuantError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import check_folder

POLICIES = ("warn", "raise")


class _Exported(NamedTuple):
    """One network of a stage that ended, and its bundle."""

    trainer: pl.Trainer
    module: pl.LightningModule
    name: str
    network: QuantizedNetwork
    calls: list[NetworkInputs]
    others: list[NetworkInputs]
    bundle: Bundle


class DeviceExport(AnyCallback):
    """Export the quantized network when a fit, validate or test ends, and measure it on a device.

    Writes the bundle ``<dirpath>/<name>/``: ``<name>.aimet/`` (ONNX and encodings, for Qualcomm AI Hub),
    ``<name>.onnx`` (QuantizeLinear/DequantizeLinear with integer weights) and ``manifest.json``. The ONNX file
    is run on some samples and must compute what the simulation computed. Then the target compiles the bundle, runs
    the same samples and reports; the report goes to ``<dirpath>/<name>.device/``. List it after the quantization
    callback.

    Examples:
        >>> DeviceExport("export", target="aihub", device="Samsung Galaxy S24")  # doctest: +SKIP

    Args:
        dirpath: folder for the bundle. Default: ``export`` in the Trainer's log or root folder.
        target: ``"aihub"`` measures on a real phone in Qualcomm's device farm; ``"htp_emulator"`` compiles for the
            phone's chip and emulates its NPU, without latency; ``"onnxruntime"`` computes on the host's CPU;
            ``"auto"`` takes the first of these that is available, and says why not a better one; ``None`` only
            exports. Or a ``lightning_quant.Target`` of your own: an instance, the dotted path of its class, its
            name once it was imported, or one of these two with options, ``{"my_package.Board": {"port": 5555}}``.
        device: name of the phone, or several of them for AI Hub. A target given as an instance has its own.
        samples: how many samples (not batches) to compare on: the stage's own validation data if there is any.
        name: name of the bundle. Default: class of the network and precision, e.g. ``FFNet-w8a8``. Where several
            networks are exported, each name ends with ``-`` and the attribute.
        monitor: name of the validation metric to compute from the device's outputs, on the same samples. Default:
            that of ``QuantizationAwareTraining`` if it has a bound on it. Not under DDP.
        mode: ``"max"`` or ``"min"``, whichever is better of ``monitor``. That of ``QuantizationAwareTraining`` counts
            if it has a bound on the same metric.
        runtime: what AI Hub compiles to, or several: ``qnn_dlc``, ``qnn_context_binary``, ``tflite``, ``onnx``,
            ``precompiled_qnn_onnx``.
        options: more options for AI Hub's compile job.
        profile: name of the client configuration in ``~/.qai_hub``; never a token.
        source: what AI Hub gets: ``"aimet"`` (ONNX and encodings) or ``"qdq"``.
        compare_float: let AI Hub measure the float network as well.
        wait: wait for AI Hub's results; ``False`` submits and returns, ``lightning-quant resume`` fetches them later.
        timeout: seconds for the target, queues included.
        on_failure: ``"warn"`` when the target fails, so that no training run is lost to a service that is down, or
            ``"raise"``. The bundle is there in either case.
        on_parity: ``"raise"`` when ONNX Runtime computes something else from the files than the simulation, and keep
            them as ``<name>.failed``; or ``"warn"`` and export them anyway.
        min_psnr: fail below this PSNR in dB against the float network. The error names the layers that cost most, and
            what helps; the report has all of them.
        max_metric_drop: fail when ``monitor`` is worse than the float network's by more than this.
        report: write ``<dirpath>/<name>.report/report.html``, one page for everything that was found out, and give
            its pictures to the Trainer's loggers. Costs some forward passes for each layer.
        network: dotted attribute of the one to export, if several networks of the module are quantized. Default: each,
            with its own inputs.
        inputs: what an app gives instead of the network's floats, one for a network with one input or a list with one
            for each: a ``lightning_quant.ImageInput`` or a mapping of its fields, such as
            ``{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}``, for pixels that the device normalizes;
            ``"image"`` for pixels that the network takes as 0…1; ``"quantized"`` for its own integers; ``None``.
        outputs: what an app gets, likewise: a ``lightning_quant.OutputEdge`` or a mapping of its fields, such as
            ``{"function": "argmax", "resize": "after"}``; ``"argmax"``, ``"top_k"``, ``"softmax"``, ``"sigmoid"``;
            ``"quantized"``; a small ``nn.Module`` of your own or its dotted path; ``None``. With one of both, devices
            run ``<name>.app.onnx`` beside the network's own; training and validation see floats as ever.
        sizes: further input sizes, each the last axes of the input: ``[256, 512]`` is a height and a width,
            ``[4, 3, 256, 512]`` a batch of four; of several inputs by name, ``{"image": [256, 512]}``. Each is a graph
            of its own in the bundle, ``<name>.256x512``, with the same encodings, checked and measured like the first.
        link: let AI Hub link the graphs of all sizes into one context binary (``runtime="qnn_context_binary"``), which
            holds their weights once, as the emulator's compiler does anyway.

    Attributes:
        bundle: the :class:`~lightning_quant.deploy.bundle.Bundle` written last, or ``None``.
        bundles: all that were written at the end of the stage, by the attribute of the network.
        reports: a :class:`~lightning_quant.deploy.device_report.DeviceReport` for each device and runtime.
        passed_over: why no better target was taken, by its name.
        blames: layer by layer, what a network that falls below a bound computes: each a
            :class:`~lightning_quant.deploy.blame.result.Blame`.

    Raises:
        ConfigurationError: for an unknown value, without a quantization callback before it, or at ``setup`` for a
            device that does not exist or cannot run the network, see :meth:`check_target`, and for an input size at
            which the network cannot be computed.
        PreflightError: at ``setup``, with ``strict=True``, for layers that the device does not compute in integers.
        ExportError, ParityError: see :func:`~lightning_quant.deploy.export.export_bundle`.
        DeviceError: with ``on_failure="raise"``.
        DeviceBoundError: when a bound is not kept, or could not be checked.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        target: str | Target | Mapping[str, Mapping[str, Any]] | None = "auto",
        device: str | Sequence[str] = "Samsung Galaxy S24",
        samples: int = 8,
        name: str | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        runtime: str | Sequence[str] = "qnn_dlc",
        options: str = "",
        profile: str | None = None,
        source: Literal["aimet", "qdq"] = "aimet",
        compare_float: bool = True,
        wait: bool = True,
        timeout: float = 3600.0,
        on_failure: Literal["warn", "raise"] = "warn",
        on_parity: Literal["warn", "raise"] = "raise",
        min_psnr: float | None = None,
        max_metric_drop: float | None = None,
        report: bool = True,
        network: str | None = None,
        inputs: Any = None,
        outputs: Any = None,
        sizes: Sequence[Size] = (),
        link: bool = False,
    ) -> None:
        if not isinstance(samples, int) or samples < 1:
            raise ConfigurationError(f"samples={samples!r}: expected a whole number of at least 1.")
        if name is not None and (not name or Path(name).name != name):
            raise ConfigurationError(f"name={name!r}: expected a plain file name without a folder.")
        for argument, policy in {"on_failure": on_failure, "on_parity": on_parity}.items():
            if policy not in POLICIES:
                raise ConfigurationError(f"{argument}={policy!r}: expected one of {', '.join(POLICIES)}.")
        self.push = None
        if target is not None:
            self.push = Push(
                target,
                [device] if isinstance(device, str) else list(device),
                timeout,
                {
                    "runtimes": [runtime] if isinstance(runtime, str) else list(runtime),
                    "options": options,
                    "profile": profile,
                    "source": source,
                    "compare_float": compare_float,
                    "wait": wait,
                    "link": link,
                },
            )
        self.dirpath = dirpath
        self.samples = samples
        self.name = name
        self.monitor = monitor
        self.mode = mode
        self.on_failure = on_failure
        self.on_parity = on_parity
        self.min_psnr = min_psnr
        self.max_metric_drop = max_metric_drop
        self._bounds.refuse_without_figures(target, wait)
        self.report = report
        self.network = network
        self.sizes = sizes
        self._sizes = InputSize.parse(sizes)
        self.inputs = inputs
        self.outputs = outputs
        self._edges = Edges.of(inputs, outputs)
        self.bundle: Bundle | None = None
        self.bundles: dict[str, Bundle] = {}
        self.reports: list[DeviceReport] = []
        self.passed_over: dict[str, str] = {}
        self.blames: list[Blame] = []
        self._checked: set[str | None] = set()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        before = callbacks[: callbacks.index(self)]
        names = [one.network_name for one in before if isinstance(one, QuantizationCallback)]
        names += quantized_networks(pl_module)
        if not names:
            raise ConfigurationError(
                "DeviceExport without a quantization callback before it: expected PostTrainingQuantization or "
                "QuantizationAwareTraining earlier in callbacks=[...] (move DeviceExport behind it), or a module from "
                "load_quantized."
            )
        if self.network is not None and self.network not in names:
            raise ConfigurationError(
                f"DeviceExport(network={self.network!r}): expected a network that is quantized, one of "
                f"{', '.join(map(repr, dict.fromkeys(names)))}."
            )
        if stage == "predict":
            return
        check_folder(self.dirpath, "dirpath")
        self._bounds.check_metric(trainer)
        self._check_networks(trainer, pl_module)
        if self.push is not None:
            for name, network in quantized_networks(pl_module).items():
                if self.network in (None, name):
                    report_off_the_npu(name, network, self.push.runs_on)

    @property
    def _bounds(self) -> DeviceBounds:
        return DeviceBounds(self.min_psnr, self.max_metric_drop, self.monitor, self.mode)

    def _check_networks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refusal = None
        if trainer.is_global_zero:
            try:
                for name, network in quantized_networks(pl_module).items():
                    if self.network in (None, name):
                        self.check_target(network.recipe)
                        with isolated_seed():
                            check_sizes(network, self._sizes)
                            check_edges(network, self._edges)
            except ConfigurationError as error:
                refusal = error
        refusal = trainer.strategy.broadcast(refusal)  # or the other processes would wait for this one
        if refusal is not None:
            raise refusal

    def check_target(self, recipe: QuantRecipe) -> None:
        """Refuse a device that does not exist, or cannot run what the recipe makes, before any work is spent.

        ``setup`` does so: from tables, and from AI Hub if it answers within seconds. What it does not answer is logged
        and not asked again until the bundle is run.

        Args:
            recipe: how the network will be quantized.

        Raises:
            UnknownDeviceError: for a device that does not exist, with near names.
            ConfigurationError: for a runtime or precision that the device lacks.
        """
        if self.push is None or recipe.int16_activations in self._checked:
            return
        for reason in self.push.check(recipe):
            rank_zero_log(f"Not known before the export whether {self.push.where} can run the network: {reason}")
        self._checked.add(recipe.int16_activations)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bounds.check_logged(trainer)
        if trainer.state.fn == "validate":
            self._export(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        networks = quantized_networks(pl_module)
        self.reports, self.passed_over, self.bundles, self.blames = [], {}, {}, []
        for name in networks if self.network is None else [self.network]:
            suffix = f"-{name}" if self.network is None and len(networks) > 1 else ""
            with measuring(trainer, pl_module)():
                self._export_one(trainer, pl_module, name, networks[name], suffix)

    def _export_one(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, network: QuantizedNetwork, suffix: str
    ) -> None:
        calls, others = export_samples(trainer, pl_module, name, network, self.samples, self._sizes)
        log_dir = trainer.log_dir  # asks rank 0, so every rank has to ask
        exported = None
        if trainer.is_global_zero:
            root = Path(self.dirpath or Path(log_dir or trainer.default_root_dir) / "export")
            stem = (self.name or f"{network.float_class.__name__}-{network.recipe.precision}") + suffix
            with progress(trainer, f"Exporting {stem}"):
                bundle = export_bundle(
                    network,
                    root / stem,
                    [*calls, *others],
                    self.on_parity,
                    self.sizes,
                    self.inputs,
                    self.outputs,
                    class_labels(pl_module),
                )
            self.bundle = self.bundles[name] = bundle
            exported = _Exported(trainer, pl_module, name, network, calls, others, bundle)
            parity = bundle.manifest.parity
            agreement = "equal to" if parity.equal else f"{parity.psnr_db} dB against"
            samples = f"{parity.samples} samples in ONNX Runtime"
            rank_zero_log(f"Exported {bundle.path} ({agreement} the simulation on {samples}).")
            for size, graph in bundle.manifest.sizes.items():
                note = ", of another size and resized" if graph.resized else ""
                rank_zero_log(f"Also at {size}: {graph.parity} on {graph.parity.samples} samples{note}.")
            for report in device_folder(bundle).rglob(REPORT_NAME):
                report.unlink()  # of the network that the bundle held before
        # before the device: jobs can queue for longer than processes wait for each other
        trainer.strategy.barrier("lightning_quant_export")
        if exported is not None:
            known = len(self.reports)
            try:
                if self.push is not None:
                    self._measure(self.push, exported)
            except DeviceBoundError as error:
                with isolated_seed(), progress(trainer, "Comparing layers"):
                    self.blames = blame_layers(network, calls, exported.bundle, self.reports[known:])
                raise DeviceBoundError(" ".join([str(error), *explanations(self.blames)])) from None
            finally:
                if self.report:
                    self._write_report(exported, self.reports[known:])

    def _write_report(self, exported: _Exported, reports: list[DeviceReport]) -> None:
        trainer = exported.trainer
        try:
            with isolated_seed(), torch.inference_mode(False), torch.no_grad(), progress(trainer, "Writing the report"):
                _, module, name, network, calls, _, bundle = exported
                path = write_callback_report(trainer, module, name, network, bundle, reports, calls, self.blames)
            rank_zero_log(f"Report: {path}")
        except Exception as error:  # nor is a training run lost to a picture
            rank_zero_warn(f"The report was not written: {type(error).__name__}: {error}")

    def _measure(self, push: Push, exported: _Exported) -> None:
        """Let the target measure the bundle, deal with its failure as asked, and check the bounds."""
        try:
            reports = self._run(push, exported)
        except Exception as error:  # whatever it is, a training run is not lost to it
            if self.on_failure == "raise":
                raise
            reason = str(error) if isinstance(error, LightningQuantError) else f"{type(error).__name__}: {error}"
            rank_zero_warn(f"The device was not measured: {reason} (The bundle {exported.bundle.path} is complete.)")
        else:
            self._bounds.check(reports, exported.trainer)

    def _run(self, push: Push, exported: _Exported) -> list[DeviceReport]:
        """Run the bundle on the target; compute the user's metric of what it returned, and log its figures."""
        trainer, pl_module, name, network, calls, others, bundle = exported
        with isolated_seed(), torch.inference_mode(False), torch.no_grad():
            among = LOOKED_AT * self.samples
            batches, differ = first_batches(trainer, pl_module, network, name, self.samples, calls[0], among)
            if differ and not batches:
                rank_zero_warn(
                    "The validation samples have another size than the exported network's inputs: the device is "
                    "compared with the simulation on calibration samples, without your metric. Validate at the size "
                    "that the device is given."
                )
            sized = sized_calls(network, self._sizes, calls, others)
            if batches:
                calls = [call for batch in batches for call in batch.calls]
            samples = samples_of_graphs(network, bundle, calls, sized)
        with progress(trainer, f"Waiting for {push.where} (at most {push.timeout / 60:.0f} min)"):
            measured = push.run(bundle, samples[""], {one: given for one, given in samples.items() if one})
        self.passed_over = push.passed_over
        if self.passed_over:
            rank_zero_log("No better target: " + "; ".join(self.passed_over.values()) + ".")
        metric = self._bounds.metric(trainer)
        reports = [one.report for one in measured]
        self.reports += reports
        graphs = {bundle.manifest.size or None: (bundle, samples[""]), "app": (bundle.app, samples.get("app"))}
        for one in measured:
            graph, given = graphs.get(one.report.size, (None, None))
            if metric and one.outputs and graph is not None and given is not None:
                note_metric(one, pl_module, name, network, metric, batches, graph, given)
            rank_zero_log(one.report.sentence())
            for warning in one.report.warnings:
                rank_zero_log(f"{one.report.device}: {warning}")
            for logger in trainer.loggers:
                logger.log_metrics(one.report.scalars(), step=trainer.global_step)
        return reports
