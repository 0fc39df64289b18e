"""Compare a simulation layer by layer with float, with its file or with the NPU's emulator, in the user's names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from lightning_quant.deploy.blame.emulator import compare_with_emulator
from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.blame.result import Against, Blame
from lightning_quant.deploy.blame.rounding import compare_with_float
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.single_samples import calls_given, first_samples
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import ConfigurationError, DeviceUnavailableError
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval

if TYPE_CHECKING:
    import onnx


def blame(
    module: nn.Module | QuantizedNetwork,
    samples: Tensor | NetworkInputs | Iterable[Tensor | NetworkInputs],
    bundle: Bundle | str | Path | None = None,
    *,
    against: Literal["file", "float", "htp_emulator"] = "file",
    count: int = 2,
    device: str = "Samsung Galaxy S24",
) -> Blame:
    """Find the layers that make the difference between a simulation and its float network, its file or the NPU.

    Every layer is run on the reference's own tensors, so that a layer which only passes an error on is told apart from
    the one that adds it: on those of the float network with ``"float"``, else on those of the simulation.

    - ``"file"``: which layers of an exported file compute something else than the simulation. The file is cut at the
      tensors that it rounds, and all pieces run at once: one pass of the simulation, two of the file for each sample.
    - ``"float"``: what rounding costs each layer, why, and what helps. Two passes of the simulation for each sample, in
      the first of which every layer computes up to three times.
    - ``"htp_emulator"``: which layers of the file the NPU computes otherwise, in float or not at all, as its emulator
      shows. The file is compiled and computed three times, for one sample.

    Examples:
        >>> print(lq.blame(module, images, against="float"))  # doctest: +SKIP

    Args:
        module: a calibrated network, or a LightningModule that holds one.
        samples: what it is run on: a batch, or calls of the network.
        bundle: the file to look at. Default: what an export of the network writes, whether or not it agrees.
        against: what to compare the simulation with.
        count: how many samples are compared; one with the emulator.
        device: the phone whose NPU is emulated.

    Raises:
        ConfigurationError: when the module holds no calibrated network, or several, ``samples`` holds something else
            than tensors and calls, or ``against`` or ``device`` is unknown.
        ExportError: when the network cannot be written as ONNX, or the bundle is not of this network.
        DeviceError: when the emulator is not installed, or fails.
    """
    network = _network(module)
    other = _other(against)
    target = _emulator(device) if other is Against.EMULATOR else None
    with on_cpu_in_eval(network.network):
        if not (calls := calls_given(samples, network.inputs)):
            raise ConfigurationError("No samples to compare the simulation on: expected at least one.")
        calls = first_samples(calls, count, network.inputs)
        if other is Against.FLOAT:
            return compare_with_float(network, calls)
        with tempfile.TemporaryDirectory() as folder:
            if bundle is None:
                qdq = Path(folder) / "model_qdq.onnx"
                input_names = write_onnx(network, calls[0], Path(folder) / "model.onnx", qdq).input_names
            else:
                known = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
                qdq, input_names = known.qdq, known.manifest.input_names
            if target is not None:
                return compare_with_emulator(network, _read(qdq), input_names, calls[0], target)
            return compare_file(network, _read(qdq), input_names, calls)


def blame_all(
    network: QuantizedNetwork,
    samples: Iterable[NetworkInputs],
    bundle: Bundle | None = None,
    emulated: str | None = None,
) -> list[Blame]:
    """Compare a simulation with float, with its bundle, and with the NPU's emulator.

    Args:
        network: the simulation.
        samples: calls of it.
        bundle: what it was exported to; ``None`` for float only.
        emulated: the phone whose NPU is emulated; ``None`` for no emulator.
    """
    calls = list(samples)
    found = [blame(network, calls, against="float")]
    if bundle is not None:
        found.append(blame(network, calls, bundle))
    if bundle is not None and emulated is not None:
        found.append(blame(network, calls, bundle, against="htp_emulator", device=emulated))
    return found


def _emulator(device: str) -> HtpEmulatorTarget:
    target = HtpEmulatorTarget(device)
    if reason := target.unavailable():
        raise DeviceUnavailableError(f"target={target.name!r} cannot be used: {reason}.")
    return target


def _other(against: str) -> Against:
    names = [one.value for one in Against]
    if against not in names:
        raise ConfigurationError(f"against={against!r}: expected one of {', '.join(names)}.")
    return Against(against)


def _network(module: nn.Module | QuantizedNetwork) -> QuantizedNetwork:
    known = QuantizedNetwork.of(module)
    if known is None and isinstance(module, nn.Module):
        found = dict(QuantizedNetwork.named_in(module))
        if len(found) > 1:
            raise ConfigurationError(
                f"The module holds {len(found)} quantized networks: {', '.join(found)}. Expected one: pass the one to "
                "look at."
            )
        known = next(iter(found.values()), None)
    if known is None or not known.calibrated:
        raise ConfigurationError(
            "The module holds no calibrated network: expected one that was run by a callback's fit, validate, test or "
            "predict, or that load_quantized() returned."
        )
    return known


def _read(file: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(file)
