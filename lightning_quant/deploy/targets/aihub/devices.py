"""Which devices AI Hub has and what each can run; also the process that asks before anything is trained for them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_quant.deploy.socs import HEXAGON_WITH_INT16
from lightning_quant.deploy.targets.aihub.job import RUNTIMES, DeviceCheck, DevicesFound
from lightning_quant.deploy.targets.aihub.service import Service
from lightning_quant.deploy.targets.worker import serve
from lightning_quant.errors import ConfigurationError, UnknownDeviceError


def find_device(service: Service, name: str, runtimes: Sequence[str], int16_activations: str | None) -> Any:
    """Return the device as AI Hub lists it, in its newest system.

    Args:
        service: to ask.
        name: of the device.
        runtimes: what it is to run, of :data:`RUNTIMES`.
        int16_activations: the part of the network with 16-bit activations, if any.

    Raises:
        UnknownDeviceError: if AI Hub has none of that name, with near ones.
        ConfigurationError: if it lacks a runtime, or 16-bit activations.
        DeviceError: if AI Hub cannot be asked.
    """
    client = service.client
    found = service.read("the list of devices", lambda: client.get_devices(name=name))
    if not found:
        known = sorted({one.name for one in service.read("the list of devices", client.get_devices)})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UnknownDeviceError(
            f"AI Hub has no device {name!r}: expected one of its {len(known)} devices"
            f"{', e.g. ' + ', '.join(near) if near else ''}. `qai-hub list-devices` lists them all."
        )
    device = found[-1]  # the newest system
    for runtime in runtimes:
        framework = RUNTIMES[runtime]
        if f"framework:{framework}" not in device.attributes:
            offered = [one.partition(":")[2] for one in device.attributes if one.startswith("framework:")]
            raise ConfigurationError(
                f"runtime={runtime!r} on {name}: it needs {framework}, the device offers "
                f"{', '.join(offered) or 'nothing'}. Choose another runtime."
            )
    hexagon = next((int(one[9:]) for one in device.attributes if one.startswith("hexagon:v")), 0)
    if int16_activations and hexagon < HEXAGON_WITH_INT16:
        chip = f"its Hexagon v{hexagon}" if hexagon else "its chip (no Hexagon NPU is named for it)"
        raise ConfigurationError(
            f"{int16_activations} on {name}: expected an NPU with 16-bit activations, {chip} has 8-bit ones "
            "at most. Use w8a8 or w4a8, or a newer device."
        )
    return device


def find_devices(job: DeviceCheck, folder: Path) -> DevicesFound:
    """Find the devices of a job, or refuse it; see :func:`find_device`."""
    service = Service(job.profile, job.timeout, time.monotonic() + job.timeout)
    for name in job.devices:
        find_device(service, name, job.runtimes, job.int16_activations)
    return DevicesFound(job.devices)


if __name__ == "__main__":
    serve(find_devices, DeviceCheck)
