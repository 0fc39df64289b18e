"""Measured figures of two networks, and where the layers are on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_quant.deploy.compare.bounds import RISING, Bound, Bounds, Part
from lightning_quant.deploy.compare.changes import Figure, LayersMoved
from lightning_quant.deploy.compare.snapshot import DeviceFigures, RunFigures, Snapshot
from lightning_quant.deploy.parity import Parity
from lightning_quant.utilities.monitor import Monitor

# Agreement beyond this many dB differs by the order of float sums, not by what is computed.
SAME_DB = 100.0
# Of the float network, which is not what is exported: shown, and no bound is on it.
FLOAT = "float"


def figures(old: Snapshot, new: Snapshot, bounds: Bounds) -> tuple[Figure, ...]:
    """Compare all figures; those of the metric in the direction that the device's report or the run's record says.

    Where neither says it, any change of the metric counts as worse.
    """
    of_run = _monitor(new.run, old.run)
    found = [(one, of_run) for one in (*_of_run(old, new), *_of_files(old, new))]
    before, now = by_device(old), by_device(new)
    for key in {**before, **now}:
        sides = before.get(key), now.get(key)
        monitor = _monitor(*(one for one in sides if one is not None)) or of_run
        found += [(one, monitor) for one in _of_device(key, *sides)]
    known = [(one, monitor) for one, monitor in found if (one.old, one.new) != (None, None)]
    return tuple(_judged(one, monitor, bounds.get(one.part)) for one, monitor in known)


def _monitor(*measured: RunFigures | DeviceFigures) -> Monitor | None:
    return next((Monitor(one.monitor, one.mode) for one in measured if one.monitor), None)


def by_device(snapshot: Snapshot) -> dict[str, DeviceFigures]:
    """Return the results of devices by what makes two of them comparable."""
    return {one.key: one for one in snapshot.devices}


def layers(old: Snapshot, new: Snapshot) -> tuple[LayersMoved, ...]:
    """Compare which layers are off the NPU, or compute in float on it, on the devices that reported both."""
    found = []
    before, now = by_device(old), by_device(new)
    parts = {"CPU": Part.LAYERS_CPU, FLOAT: Part.LAYERS_FLOAT}
    for key in [key for key in before if key in now]:
        sides = [{**(one.layers or {}), FLOAT: one.float_layers} for one in (before[key], now[key])]
        for unit in {**sides[0], **sides[1]}:
            there, here = (side.get(unit) for side in sides)
            if there is not None and here is not None and set(there) != set(here):
                came = tuple(name for name in here if name not in there)
                left = tuple(name for name in there if name not in here)
                found.append(LayersMoved(parts.get(unit), key, unit, came, left))
    return tuple(found)


def _of_run(old: Snapshot, new: Snapshot) -> Iterator[Figure]:
    for name in (FLOAT, "simulation"):
        yield Figure(Part.METRIC, name, old.run.metric.get(name), new.run.metric.get(name))
    for kind in {**old.run.classes, **new.run.classes}:
        before, now = old.run.classes.get(kind, {}), new.run.classes.get(kind, {})
        for name in {**before, **now}:
            yield Figure(Part.CLASS, f"{kind} of {name}", before.get(name), now.get(name))


def _of_files(old: Snapshot, new: Snapshot) -> Iterator[Figure]:
    yield from _agreement(Part.PARITY, "ONNX file with simulation", old.parity, new.parity)
    for name in {**old.bytes, **new.bytes}:
        yield Figure(Part.SIZE, f"{name} ONNX file", old.bytes.get(name), new.bytes.get(name))


def _of_device(key: str, old: DeviceFigures | None, new: DeviceFigures | None) -> Iterator[Figure]:
    nothing = DeviceFigures("", "", "", "", {}, 0)
    before, now = old or nothing, new or nothing
    yield Figure(Part.METRIC, key, before.metric, now.metric)
    yield from _agreement(Part.PSNR, f"{key}, with float", before.against_float, now.against_float)
    yield from _agreement(Part.PSNR, f"{key}, with simulation", before.against_simulation, now.against_simulation)
    yield Figure(Part.LATENCY, key, before.latency_us, now.latency_us)
    yield Figure(Part.MEMORY, key, before.memory_bytes, now.memory_bytes)
    yield Figure(Part.SIZE, f"compiled, {key}", before.compiled_bytes, now.compiled_bytes)
    for unit in ("CPU", FLOAT):
        part = Part.LAYERS_CPU if unit == "CPU" else Part.LAYERS_FLOAT
        yield Figure(part, key, _layer_count(before, unit), _layer_count(now, unit))


def _layer_count(device: DeviceFigures, unit: str) -> float | None:
    names = device.float_layers if unit == FLOAT else (device.layers or {}).get(unit)
    return None if names is None else len(names)


def _agreement(part: Part, name: str, old: Parity | None, new: Parity | None) -> Iterator[Figure]:
    """Yield the PSNR and the share of equal classes: of outputs that are classes, only the latter says anything."""
    of_classes = [one for one in (old, new) if one is not None and one.equal and one.argmax_agreement not in (None, 1)]
    if not of_classes:
        yield Figure(part, name, None if old is None else old.psnr_db, None if new is None else new.psnr_db)
    before, now = (None if one is None else one.argmax_agreement for one in (old, new))
    yield Figure(Part.AGREEMENT, name, before, now)


def _judged(figure: Figure, monitor: Monitor | None, bound: Bound | None) -> Figure:
    """Add how much worse a figure became, and whether that is too much."""
    old, new, part = figure.old, figure.new, figure.part
    if part is Part.METRIC and figure.name == FLOAT:
        bound = None
    if old is None or new is None:
        return replace(figure, exceeds=bound is not None and new is None)
    if part in (Part.PARITY, Part.PSNR):
        worse = min(old, SAME_DB) - min(new, SAME_DB)
    elif part is Part.METRIC:
        worse = abs(new - old) if monitor is None else monitor.drop(new, old)
    elif part in RISING or part in (Part.LAYERS_CPU, Part.LAYERS_FLOAT):
        worse = new - old
    else:
        worse = old - new
    if bound is None:
        return replace(figure, worse=worse)
    if part in (Part.LAYERS_CPU, Part.LAYERS_FLOAT):  # by name: one that left makes up for none that came
        return replace(figure, worse=worse, amount=worse)
    amount = bound.amount(worse, old)
    return replace(figure, worse=worse, amount=amount, exceeds=not bound.allows(worse, old))
