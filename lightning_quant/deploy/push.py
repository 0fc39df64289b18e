"""An exported network on a target: its outputs compared with simulation and float, the report written."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_quant.deploy import parity
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.device_report import GOOD_PSNR, DeviceReport
from lightning_quant.deploy.samples import Samples, Tensors
from lightning_quant.deploy.targets.aihub.target import AiHubTarget
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.deploy.targets.onnxruntime import OnnxRuntimeTarget
from lightning_quant.deploy.targets.target import LONGEST, REPORT_NAME, Measured, Target
from lightning_quant.errors import (
    ConfigurationError,
    DataError,
    DeviceBoundError,
    DeviceError,
    DeviceUnavailableError,
)
from lightning_quant.utilities.files import replacing
from lightning_quant.utilities.parsing import check, fitting, read_json

SAMPLES_NAME = "samples.npz"
REQUEST_NAME = "request.json"

# Best first: what target="auto" tries.
TARGETS = ("aihub", "htp_emulator", "onnxruntime")


class Push:
    """A bundle's way to a target: what to run it on, kept so that it can be gone on with later.

    Args:
        target: one of :data:`TARGETS`, or ``"auto"`` for the best that is available.
        devices: names of the devices.
        timeout: seconds for everything.
        options: further arguments of :class:`~lightning_quant.deploy.targets.aihub.target.AiHubTarget`.

    Attributes:
        passed_over: after :meth:`run` with ``"auto"``: why each better target was not taken.

    Raises:
        ConfigurationError: for an unknown target or device, or several devices where one is possible.
    """

    def __init__(self, target: str, devices: Sequence[str], timeout: float, options: dict[str, Any]) -> None:
        if target not in (*TARGETS, "auto"):
            raise ConfigurationError(f"Unknown target {target!r}: expected one of auto, {', '.join(TARGETS)}.")
        if len(devices) > 1 and target != "aihub":
            raise ConfigurationError(f"{len(devices)} devices with target={target!r}: only aihub takes several.")
        self.target = target
        self.devices = list(devices)
        self.timeout = timeout
        self.options = options
        self.passed_over: dict[str, str] = {}
        if target != "auto":
            self._make(target)  # wrong arguments are told now, not after training

    def run(self, bundle: Bundle, samples: Samples) -> list[Measured]:
        """Run a bundle and write a report for each device and runtime; artifacts are kept beside the bundle.

        Raises:
            DeviceUnavailableError: if the target cannot be used.
            DeviceError: when nothing came of it. A device that failed alone says so in its report.
        """
        folder = device_folder(bundle)
        samples.write(folder / SAMPLES_NAME)
        self._note(bundle, self.target)
        target = self._choose(bundle)
        self._note(bundle, target.tier)  # what was begun at one target is not gone on with at another
        measured = target.run(bundle, samples.inputs, folder / target.tier)
        for one in measured:
            _compare(one, samples)
            one.report.bytes = {**bundle.manifest.bytes, **one.report.bytes}
            one.write()
        return measured

    def _note(self, bundle: Bundle, target: str) -> None:
        request = {"target": target, "devices": self.devices, "timeout": self.timeout, "options": self.options}
        request["bundle"] = _files(bundle)
        with replacing(device_folder(bundle) / REQUEST_NAME) as partial:
            partial.write_text(json.dumps(request, indent=2) + "\n")

    def _choose(self, bundle: Bundle) -> Target:
        """The target, or the best one that takes the bundle; why not the better ones is kept."""
        self.passed_over = {}
        if self.target != "auto":
            target = self._make(self.target)
            if reason := target.unavailable():
                raise DeviceUnavailableError(f"target={self.target!r} cannot be used: {reason}.")
            target.check(bundle)
            return target
        for name in TARGETS:
            try:
                target = self._make(name)
                if (reason := target.unavailable()) is None:
                    target.check(bundle)
                    return target
            except ConfigurationError as error:  # such as a phone whose chip only AI Hub knows
                reason = str(error).rstrip(".")
            self.passed_over[name] = reason
        raise DeviceUnavailableError("No target can be used: " + "; ".join(self.passed_over.values()) + ".")

    def _make(self, name: str) -> Target:
        if name == "aihub":
            return AiHubTarget(self.devices, timeout=self.timeout, **self.options)
        if name == "htp_emulator":
            return HtpEmulatorTarget(self.devices[0], self.timeout)
        return OnnxRuntimeTarget()


def _files(bundle: Bundle) -> dict[str, Any]:
    return {path: asdict(file) for path, file in bundle.manifest.files.items()}


def device_folder(bundle: Bundle) -> Path:
    """Where everything a device brings back is kept: beside the bundle, for an export replaces that whole."""
    return bundle.path.with_name(f"{bundle.path.name}.device")


def finished(folder: Path) -> bool:
    """Whether every report in a :func:`device_folder` is there and whole."""
    try:
        states = [DeviceReport.read(path).status for path in folder.rglob(REPORT_NAME)]
    except DataError:
        return False
    return bool(states) and set(states) == {"finished"}


def resume(path: str | Path) -> list[Measured]:
    """Go on with a bundle whose jobs were submitted, or whose run was interrupted; wait for the results.

    Args:
        path: folder of the bundle.

    Raises:
        ExportError: if there is no such bundle.
        ConfigurationError: if it was never sent to a target.
        DataError: if the bundle was exported anew since, or the samples are damaged.
        DeviceError: see :meth:`Push.run`.
    """
    bundle = load_bundle(path)
    folder = device_folder(bundle)
    try:
        request = _read_request(folder / REQUEST_NAME)
        request["options"]["wait"] = True
        push = Push(request["target"], request["devices"], request["timeout"], request["options"])
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{bundle.path} was not sent to a target yet ({folder / REQUEST_NAME}: {error}): expected a bundle that "
            "DeviceExport pushed."
        ) from error
    if request.get("bundle") != _files(bundle):
        raise DataError(
            f"{bundle.path} was exported anew after it was sent to {request['target']}: expected the files that were "
            "sent, since the samples kept beside it are compared with those. Push the new one with DeviceExport."
        )
    samples = Samples.read(folder / SAMPLES_NAME)
    named = {
        "input_names": (samples.inputs, bundle.manifest.input_names),
        "output_names": (samples.simulation, bundle.manifest.output_names),
    }
    for what, (tensors, names) in named.items():
        if sorted(tensors[0]) != sorted(names):
            raise DataError(
                f"{folder / SAMPLES_NAME} holds {', '.join(tensors[0])}: expected the {what} of {bundle.path}, "
                f"{', '.join(names)}. Export again."
            )
    return push.run(bundle, samples)


def _read_request(path: Path) -> dict[str, Any]:
    """What was asked of a target.

    Raises:
        OSError, ValueError: when it is missing or damaged.
    """
    request = read_json(path)
    kinds = {"target": str, "devices": list[str], "timeout": float, "options": dict[str, Any]}
    fitting(request, dict[str, Any])
    for name, kind in kinds.items():
        check(name in request, name, None, "the field to be there")
        fitting(request[name], kind, name)
    check(0 < request["timeout"] <= LONGEST, "timeout", request["timeout"], f"0 to {LONGEST:.0f} seconds")
    known = typing.get_type_hints(AiHubTarget.__init__)
    for name, value in request["options"].items():
        check(
            name in known and name not in ("devices", "timeout"), f"options.{name}", value, "an option of AiHubTarget"
        )
        fitting(value, known[name], f"options.{name}")
    return dict(request)


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
        report.warnings.append(f"PSNR {psnr:.1f} dB: above {GOOD_PSNR:.0f} dB is typically good.")
    if report.speedup is not None and report.speedup < 1:
        report.warnings.append(f"Quantized it is slower than in float: {report.speedup:.2f} times as fast.")


def _agreement(reference: Sequence[Tensors], outputs: Sequence[Tensors]) -> parity.Parity:
    pairs = list(zip(reference, outputs, strict=False))  # of large samples a target may take fewer
    for index, (expected, actual) in enumerate(pairs):
        wanted, got = ({name: value.shape for name, value in one.items()} for one in (expected, actual))
        if any(got.get(name) != shape for name, shape in wanted.items()):
            raise DeviceError(
                f"The outputs of sample {index} are {got}: expected {wanted}, as the samples beside the bundle say. "
                "Export again."
            )
    return parity.compare(
        (list(expected.values()), [actual[name] for name in expected]) for expected, actual in pairs
    ).rounded()


def check_bounds(
    reports: Sequence[DeviceReport], min_psnr: float | None, max_metric_drop: float | None, mode: str = "max"
) -> None:
    """Fail when a device falls below what the user asked for.

    Args:
        reports: of one network.
        min_psnr: lowest PSNR in dB against the float network, or against the simulation where that is not known.
        max_metric_drop: how much worse the metric may be on the device than that of the float network.
        mode: ``"max"`` or ``"min"``, whichever is better of the metric.

    Raises:
        DeviceBoundError: naming the first device that falls short, with its figure.
    """
    for report in reports:
        agreement = report.against
        where = f"{report.precision} on {report.device} ({report.tier})"
        if min_psnr is not None and agreement is not None:
            psnr, share = agreement.psnr_db, agreement.argmax_agreement
            if agreement.equal and share is not None and share < 1:
                raise DeviceBoundError(
                    f"{where}: its outputs are classes, {share:.2%} of them the same, of which there is no PSNR, but "
                    f"min_psnr={min_psnr:g} dB was asked for. Use max_metric_drop."
                )
            if psnr < min_psnr:
                raise DeviceBoundError(
                    f"{where}: PSNR {psnr:.1f} dB, expected min_psnr={min_psnr:g} dB. Use a finer precision (w8a16), "
                    "or a ladder with more rungs."
                )
        if max_metric_drop is not None and {"float", "device"} <= report.metric.keys():
            drop = (report.metric["float"] - report.metric["device"]) * (1 if mode == "max" else -1)
            if drop > max_metric_drop:
                raise DeviceBoundError(
                    f"{where}: the metric drops by {drop:.4f} to {report.metric['device']:.4f}, expected at most "
                    f"max_metric_drop={max_metric_drop:g}. Use a finer precision (w8a16), or a ladder with more rungs."
                )
