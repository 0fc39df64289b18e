"""Run an exported network on a target, compare its outputs with simulation and float, write the report."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_quant.deploy import parity
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.device_report import GOOD_PSNR, DeviceReport
from lightning_quant.deploy.request import Request
from lightning_quant.deploy.samples import Samples, Tensors
from lightning_quant.deploy.targets.aihub.target import AiHubTarget
from lightning_quant.deploy.targets.target import REPORT_NAME, TARGETS, Measured, Target
from lightning_quant.errors import (
    ConfigurationError,
    DataError,
    DeviceBoundError,
    DeviceError,
    DeviceUnavailableError,
    UnknownDeviceError,
)
from lightning_quant.recipe import QuantRecipe
from lightning_quant.utilities.monitor import Monitor
from lightning_quant.utilities.registry import Spec

REQUEST_NAME = "request.json"


class Push:
    """Run bundles on a target, and keep what was asked for so that it can be resumed.

    Args:
        target: ``"auto"`` for the best of this package's targets that is available; or a target, its name or the dotted
            path of its class, or one of the latter two with options.
        devices: names of the devices.
        timeout: seconds for everything.
        options: further arguments of :class:`~lightning_quant.deploy.targets.aihub.target.AiHubTarget`.

    Attributes:
        passed_over: after :meth:`run` with ``"auto"``: why each better target was not taken.
        runs_on: the devices; none for a target that was given as an instance, which has its own.

    Raises:
        ConfigurationError: for an unknown target or device, or several devices where one is possible.
    """

    def __init__(self, target: Target | Spec, devices: Sequence[str], timeout: float, options: dict[str, Any]) -> None:
        self.devices = list(devices)
        self.timeout = timeout
        self.options = options
        self.passed_over: dict[str, str] = {}
        self._target: Target | None = None
        self._unknown_to: dict[str, UnknownDeviceError] = {}
        if target == "auto":
            self._check_single("auto")
        else:  # wrong arguments are refused now, not after training
            self._target = TARGETS.make(target, self._offered)
        self._kept = isinstance(target, str) and (target == "auto" or target in TARGETS.homes)
        self.runs_on = [] if isinstance(target, Target) else self.devices
        self.where = target.name if isinstance(target, Target) else ", ".join(self.devices)

    def check(self, recipe: QuantRecipe) -> list[str]:
        """Refuse, before a network is trained, a device that does not exist or cannot run what the recipe makes.

        With ``"auto"`` a device is refused if neither AI Hub nor the emulator has it. Without an answer of AI Hub that
        is not known, and the targets are chosen by :meth:`run`.

        Args:
            recipe: how the network will be quantized.

        Returns:
            Why a target could not be asked, a sentence each.

        Raises:
            UnknownDeviceError: for a device that does not exist, with near names.
            ConfigurationError: for a runtime or precision that the device lacks.
        """
        unasked: list[str] = []
        if (target := self._target) is not None:
            try:
                if reason := target.unavailable():
                    unasked.append(f"{reason}.")
                target.check_recipe(recipe)
            except (DeviceError, OSError) as error:  # such as a configuration that cannot be read
                unasked.append(str(error))
            return unasked
        self._unknown_to = {}
        for name in TARGETS.homes:
            try:
                TARGETS.make(name, self._offered).check_recipe(recipe)
            except UnknownDeviceError as error:
                self._unknown_to[name] = error
            except (DeviceError, OSError) as error:
                unasked.append(str(error))
        if {"aihub", "htp_emulator"} <= self._unknown_to.keys():
            raise self._unknown_to["aihub"]  # the one that knows all phones
        return unasked

    def run(self, bundle: Bundle, samples: Samples, further: Mapping[str, Samples] | None = None) -> list[Measured]:
        """Run a bundle and write a report for each device and runtime; artifacts are kept next to the bundle.

        Args:
            bundle: the exported network.
            samples: to compute and compare.
            further: samples of its other graphs, by their names: a report for each of these as well.

        Raises:
            DeviceUnavailableError: if the target cannot be used.
            DeviceError: when there is no result. A device that failed alone says so in its report.
        """
        folder = device_folder(bundle)
        graphs = [(bundle, samples), *((bundle.graphs[name], given) for name, given in (further or {}).items())]
        for graph, given in graphs:
            given.write(folder / samples_name(graph))
        self._request(bundle, "auto" if self._target is None else self._target.name).write(folder / REQUEST_NAME)
        target = self._choose(bundle)
        # what was started on one target is not resumed on another
        self._request(bundle, target.name).write(folder / REQUEST_NAME)
        found = target.run_sizes([(graph, given.inputs) for graph, given in graphs], folder / target.name)
        for (graph, given), measured in zip(graphs, found, strict=True):
            for one in measured:
                _compare(one, given)
                one.report.size = graph.manifest.size or None
                one.report.edged = graph.edged
                one.report.bytes = {**graph.manifest.bytes, **one.report.bytes}
                _check_report(one.report, target)
                one.write()
        return [one for measured in found for one in measured]

    def _request(self, bundle: Bundle, target: str) -> Request:
        options = self.options if self._kept else None
        return Request(target, self.devices, self.timeout, options, bundle.manifest.files)

    def _choose(self, bundle: Bundle) -> Target:
        """Return the target, or the best one that takes the bundle; why not the better ones is kept."""
        self.passed_over = {}
        if (target := self._target) is not None:
            if reason := target.unavailable():
                raise DeviceUnavailableError(f"target={target.name!r} cannot be used: {reason}.")
            target.check(bundle)
            return target
        for name in TARGETS.homes:
            try:
                if name in self._unknown_to:
                    raise self._unknown_to[name]
                target = TARGETS.make(name, self._offered)
                if (reason := target.unavailable()) is None:
                    target.check(bundle)
                    return target
            except ConfigurationError as error:  # such as a phone whose chip only AI Hub knows
                reason = str(error).rstrip(".")
            self.passed_over[name] = reason
        raise DeviceUnavailableError("No target can be used: " + "; ".join(self.passed_over.values()) + ".")

    def _offered(self, kind: type[Target]) -> dict[str, Any]:
        """Return the arguments that the constructor of a target may name."""
        if "devices" not in inspect.signature(kind).parameters:
            self._check_single(kind.name)
        one = {"device": self.devices[0]} if self.devices else {}
        own = self.options if issubclass(kind, AiHubTarget) else {}
        return {**one, "devices": self.devices, "timeout": self.timeout, **own}

    def _check_single(self, target: str) -> None:
        if len(self.devices) > 1:
            raise ConfigurationError(f"{len(self.devices)} devices with target={target!r}: only aihub takes several.")


def device_folder(bundle: Bundle) -> Path:
    """Return the folder of all results of devices: next to the bundle, since an export replaces that as a whole."""
    return bundle.path.with_name(f"{bundle.path.name}.device")


def samples_name(bundle: Bundle) -> str:
    """Return the name of the file with the samples of a bundle, or of it at a further size."""
    return f"samples{bundle.stem.removeprefix(bundle.path.name)}.npz"


def finished(folder: Path) -> bool:
    """Return whether every report in a :func:`device_folder` is there and whole."""
    try:
        states = [DeviceReport.read(path).status for path in folder.rglob(REPORT_NAME)]
    except DataError:
        return False
    return bool(states) and set(states) == {"finished"}


def resume(path: str | Path, target: Target | Spec | None = None) -> list[Measured]:
    """Resume a bundle whose jobs were submitted, or whose run was interrupted; wait for the results.

    Args:
        path: folder of the bundle.
        target: what it was sent to, if that was a target of your own or one with options of its own, which is in no
            file. Default: that of the request next to the bundle.

    Raises:
        ExportError: if there is no such bundle.
        ConfigurationError: if it was never sent to a target, or to one that is in no file.
        DataError: if the bundle was exported again since, or the samples are damaged.
        DeviceError: see :meth:`Push.run`.
    """
    bundle = load_bundle(path)
    folder = device_folder(bundle)
    try:
        request = Request.read(folder / REQUEST_NAME)
        if target is None and request.options is not None:
            target = request.target
        if target is not None:
            push = Push(target, request.devices, request.timeout, {**(request.options or {}), "wait": True})
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{bundle.path} was not sent to a target yet ({folder / REQUEST_NAME}: {error}): expected a bundle that "
            "DeviceExport pushed."
        ) from error
    if target is None:
        raise ConfigurationError(
            f"{bundle.path} was sent to target {request.target!r}, which was made in Python: expected it again, "
            "lightning_quant.deploy.push.resume(path, target=...)."
        )
    if request.bundle != bundle.manifest.files:
        raise DataError(
            f"{bundle.path} was exported again after it was sent to {request.target}: expected the files that were "
            "sent, since the samples kept next to it are compared with those. Push the new one with DeviceExport."
        )
    further = {name: _read_samples(folder, graph) for name, graph in bundle.graphs.items()}
    return push.run(bundle, _read_samples(folder, bundle), further)


def _read_samples(folder: Path, bundle: Bundle) -> Samples:
    samples = Samples.read(folder / samples_name(bundle))
    named = {
        "input_names": (samples.inputs, bundle.manifest.input_names),
        "output_names": (samples.simulation, bundle.manifest.output_names),
    }
    for what, (tensors, names) in named.items():
        if sorted(tensors[0]) != sorted(names):
            raise DataError(
                f"{folder / samples_name(bundle)} holds {', '.join(tensors[0])}: expected the {what} of "
                f"{bundle.path}, {', '.join(names)}. Export again."
            )
    return samples


def _check_report(report: DeviceReport, target: Target) -> None:
    try:
        report.validate()
    except ValueError as error:
        raise DeviceError(f"The report of target {target.name!r} cannot be: {error}.") from error


def _compare(measured: Measured, samples: Samples) -> None:
    report, outputs = measured.report, measured.outputs
    if not outputs:
        return
    report.samples = len(outputs)
    report.against_simulation = _agreement(samples.simulation, outputs)
    if samples.float_network is not None:
        report.against_float = _agreement(samples.float_network, outputs)
    psnr = (report.against_float or report.against_simulation).psnr_db
    if psnr == parity.LOWEST_PSNR:
        report.warnings.append("Outputs hold NaN or Inf, or what they are compared with is zero.")
    elif psnr < GOOD_PSNR:
        report.warnings.append(f"PSNR {psnr:.2f} dB: above {GOOD_PSNR:.0f} dB is typically good.")
    if report.speedup is not None and report.speedup < 1:
        report.warnings.append(f"Quantized it is slower than in float: {report.speedup:.2f} times as fast.")


def _agreement(reference: Sequence[Tensors], outputs: Sequence[Tensors]) -> parity.Parity:
    pairs = list(zip(reference, outputs, strict=False))  # of large samples a target may take fewer
    for index, (expected, actual) in enumerate(pairs):
        wanted, got = ({name: value.shape for name, value in one.items()} for one in (expected, actual))
        if any(got.get(name) != shape for name, shape in wanted.items()):
            raise DeviceError(
                f"The outputs of sample {index} are {got}: expected {wanted}, as the samples next to the bundle say. "
                "Export again."
            )
    return parity.compare(
        (list(expected.values()), [actual[name] for name in expected]) for expected, actual in pairs
    ).rounded()


def check_bounds(
    reports: Sequence[DeviceReport],
    min_psnr: float | None,
    max_metric_drop: float | None,
    mode: Literal["max", "min"] = "max",
) -> None:
    """Fail when a device falls below what the user asked for.

    Args:
        reports: of one network.
        min_psnr: lowest PSNR in dB against the float network, or against the simulation where that is not known; of the
            network's own numbers, not of what edges make of them.
        max_metric_drop: how much worse the metric may be on the device than that of the float network; of the graphs
            of which it was computed.
        mode: ``"max"`` or ``"min"``, whichever is better of the metric.

    Raises:
        DeviceBoundError: naming the first device that falls short, with its figure, or that finished without one.
    """
    compared = {"float", "device"}
    with_metric = {(one.device, one.runtime) for one in reports if compared <= one.metric.keys()}
    for report in reports:
        if min_psnr is not None and not report.edged:
            _check_psnr(report, min_psnr)
        if max_metric_drop is None:
            continue
        if compared <= report.metric.keys():
            _check_drop(report, max_metric_drop, mode)
        elif report.status == "finished" and (report.device, report.runtime) not in with_metric:
            raise DeviceBoundError(
                f"{_where(report)}: max_metric_drop={max_metric_drop:g} was asked for, but the metric is known of "
                f"{', '.join(report.metric) or 'nothing'}: expected that of float and device. "
                f"{' '.join(report.warnings)}".rstrip()
            )


def _check_psnr(report: DeviceReport, min_psnr: float) -> None:
    agreement = report.against
    if agreement is None:
        if report.status == "finished":
            raise DeviceBoundError(
                f"{_where(report)}: returned no outputs, of which min_psnr={min_psnr:g} dB was asked for. "
                f"{' '.join(report.warnings)}".rstrip()
            )
        return
    psnr, share = agreement.psnr_db, agreement.argmax_agreement
    if agreement.equal and share is not None and share < 1:
        raise DeviceBoundError(
            f"{_where(report)}: its outputs are classes, {share:.2%} of them the same, of which there is no PSNR, but "
            f"min_psnr={min_psnr:g} dB was asked for. Use max_metric_drop."
        )
    if psnr < min_psnr:
        raise DeviceBoundError(
            f"{_where(report)}: PSNR {psnr:.1f} dB, expected min_psnr={min_psnr:g} dB. Use a finer precision (w8a16), "
            "or a ladder with more rungs."
        )


def _check_drop(report: DeviceReport, max_metric_drop: float, mode: Literal["max", "min"]) -> None:
    drop = Monitor("", mode).drop(report.metric["device"], report.metric["float"])
    if not drop <= max_metric_drop:  # nor of NaN
        raise DeviceBoundError(
            f"{_where(report)}: the metric drops by {drop:.4f} to {report.metric['device']:.4f}, expected at most "
            f"max_metric_drop={max_metric_drop:g}. Use a finer precision (w8a16), or a ladder with more rungs."
        )


def _where(report: DeviceReport) -> str:
    return f"{report.precision} on {report.place} ({report.tier})"
