"""What the NPU of a named device does not compute in integers, reported before calibration."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_quant.deploy.socs import hexagon_of
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.operators import off_the_npu
from lightning_quant.simulation.preflight import refuse, table


def report_off_the_npu(name: str, network: QuantizedNetwork, devices: Iterable[str]) -> None:
    """Warn of what the NPUs of devices do not compute in integers, beyond what the preflight found for its own NPU.

    Args:
        name: attribute of the network in its LightningModule.
        network: quantized; its findings are extended.
        devices: names of phones or chips; one whose chip is not known is skipped.

    Raises:
        PreflightError: instead of the warning, with ``strict=True``.
    """
    for device in devices:
        if (hexagon := hexagon_of(device)) is None:
            continue
        known = {(finding.module, finding.kind) for finding in network.findings}
        found = [one for one in off_the_npu(network, hexagon) if (one.module, one.kind) not in known]
        if found and network.recipe.strict:
            refuse(found)
        if found:
            rank_zero_warn(f"Not all of {name!r} is computed in integers by the NPU of {device}:\n{table(found)}")
        network.findings += found
