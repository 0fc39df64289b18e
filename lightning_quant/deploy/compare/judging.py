"""Two networks compared, part by part, and judged by bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_quant.deploy.compare.bounds import MEASURED, Bounds, Part, Unit
from lightning_quant.deploy.compare.changes import Exceeded, How, Known, Stated
from lightning_quant.deploy.compare.figures import by_device, figures, layers
from lightning_quant.deploy.compare.reading import Side
from lightning_quant.deploy.compare.result import Changes
from lightning_quant.deploy.compare.snapshot import DeviceFigures, RunFigures, Snapshot
from lightning_quant.deploy.compare.tensors import encodings, is_parameter, operations, weights
from lightning_quant.errors import ConfigurationError

_SHOWN = 3


def compare_sides(old: Side, new: Side, bounds: Bounds) -> Changes:
    """Compare two networks.

    Args:
        old: the earlier one.
        new: the later one.
        bounds: how much worse each thing may become.

    Raises:
        ConfigurationError: when they are not the same network, with what is different, or were measured by different
            metrics.
    """
    before, now = old.snapshot, new.snapshot
    known = _known(before, now)
    _check_same_network(before, now, known)
    changes = Changes(
        old=before.name,
        new=now.name,
        stated=tuple(_stated(before, now)),
        figures=figures(before, now, bounds),
        layers=layers(before, now),
        operations=operations(before, now),
        encodings=encodings(old, new),
        weights=weights(old, new),
        unfinished={one.key: one.status for one in now.devices if one.status != "finished"},
        known=known,
        bounds=tuple(bounds.values()),
    )
    measured = {one.part for one in changes.figures}
    return replace(
        changes,
        exceeded=tuple(one for part in bounds for one in _exceeded(changes, part, bounds)),
        unchecked=tuple(part for part in bounds if part in MEASURED and part not in measured),
    )


def _check_same_network(old: Snapshot, new: Snapshot, known: Known) -> None:
    for what in ("inputs", "outputs"):
        before, now = getattr(old, what), getattr(new, what)
        if before != now:
            raise _different(old, new, f"the {what} are {_sizes(before)} and {_sizes(now)}")
    sides = [_weights(old), _weights(new)]
    common = sides[0].keys() & sides[1].keys()
    for name in sorted(common):
        if sides[0][name] != sides[1][name]:
            shapes = [list(side[name]) for side in sides]
            raise _different(old, new, f"the weight {name!r} has the sizes {shapes[0]} and {shapes[1]}")
    others = [name for name in {**sides[0], **sides[1]} if name not in common]
    # other versions of what exports may name what they make of a weight otherwise
    renamed = not known.versions and 2 * len(common) >= max(len(sides[0]), len(sides[1]))
    if others and not renamed:
        raise _different(old, new, f"only one of them has {', '.join(map(repr, others[:_SHOWN]))}")
    before, now = by_device(old), by_device(new)
    pairs: list[tuple[RunFigures | DeviceFigures, RunFigures | DeviceFigures]] = [(old.run, new.run)]
    pairs += [(before[key], now[key]) for key in before if key in now]
    for one, other in pairs:
        if one.monitor and other.monitor and (one.monitor, one.mode) != (other.monitor, other.mode):
            raise ConfigurationError(
                f"{old.name} was measured by {one.monitor!r} ({one.mode}) and {new.name} by {other.monitor!r} "
                f"({other.mode}): expected one metric. Run the earlier one again with monitor and mode of the later "
                "one."
            )


def _different(old: Snapshot, new: Snapshot, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{old.name} and {new.name} are different networks: {why}. Expected two exports of one network; for another "
        "one write a baseline of its own."
    )


def _sizes(tensors: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {sizes}" for name, sizes in tensors.items())


def _weights(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that are named after modules."""
    constants = snapshot.graphs["aimet"].constants
    return {name: one.shape for name, one in constants.items() if len(one.shape) > 1 and is_parameter(name)}


def _known(old: Snapshot, new: Snapshot) -> Known:
    hashes = (old.float_sha256, new.float_sha256)
    before, now = by_device(old), by_device(new)
    both = [(before[key], now[key]) for key in before if key in now]
    configurations, rungs = ({getattr(one.run, name) for one in (old, new)} - {""} for name in ("config_hash", "rung"))
    return Known(
        versions=old.versions == new.versions,
        recipe=old.recipe == new.recipe,
        float_weights=None if None in hashes else hashes[0] == hashes[1],
        trained="qat" in rungs or len(rungs) > 1 or len(configurations) > 1,
        files=all(old.graphs[part].sha256 == new.graphs[part].sha256 for part in old.graphs),
        device_versions=all(one.versions == other.versions for one, other in both),
        samples=old.parity.samples == new.parity.samples and all(one.samples == other.samples for one, other in both),
    )


def _stated(old: Snapshot, new: Snapshot) -> Iterator[Stated]:
    yield from _others(Part.VERSIONS, old.versions, new.versions)
    before, now = by_device(old), by_device(new)
    for key in [key for key in before if key in now]:
        sides = ({f"{name} ({key})": one for name, one in side[key].versions.items()} for side in (before, now))
        yield from _others(Part.VERSIONS, *sides)
    yield from _others(Part.RECIPE, old.recipe, new.recipe)
    runs = [{"exported rung": one.run.rung, "configuration": one.run.config_hash} for one in (old, new)]
    yield from _others(Part.RECIPE, *({name: one for name, one in run.items() if one} for run in runs))
    hashes = [{"sha256": one.float_sha256[:12]} if one.float_sha256 else {} for one in (old, new)]
    yield from _others(Part.FLOAT_WEIGHTS, *hashes)
    if old.io and new.io:  # a baseline from before there was a contract has none
        yield from _others(Part.IO, old.io, new.io)


def _others(part: Part, old: dict[str, str], new: dict[str, str]) -> Iterator[Stated]:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield Stated(part, name, old.get(name), new.get(name))


def _exceeded(changes: Changes, part: Part, bounds: Bounds) -> Iterator[Exceeded]:
    """Yield the bound on a part if it is not kept."""
    bound = bounds[part]
    figured = [one for one in changes.figures if one.part is part and one.exceeds]
    figured.sort(key=lambda one: (one.new is None, one.amount or 0.0), reverse=True)
    if figured:
        worst = figured[0]
        yield Exceeded(bound, tuple(one.name for one in figured), worst.amount, missing=worst.new is None)
    counts_lost = Part.PARAMETERS_LOST in bounds
    rows = {
        Part.LAYERS_CPU: _came(changes, part),
        Part.LAYERS_FLOAT: _came(changes, part),
        Part.PARAMETERS_LOST: list(dict.fromkeys(one.name for one in changes.weights if one.how is How.LOST)),
        Part.VERSIONS: (stated := [one.name for one in changes.stated if one.part is part]),
        Part.RECIPE: stated,
        Part.FLOAT_WEIGHTS: stated,
        Part.IO: stated,
        Part.OPERATIONS: [one.name for one in changes.operations],
        Part.ENCODINGS: [one.tensor for one in changes.encodings],
        Part.WEIGHTS: [one.name for one in changes.weights if one.how is not How.LOST or not counts_lost],
    }
    names = rows.get(part, [])
    if bound.unit is Unit.EXPLAINED and changes.known.explains:
        return
    if len(names) > bound.most:
        is_rule = bound.unit in (Unit.UNCHANGED, Unit.EXPLAINED)
        yield Exceeded(bound, tuple(dict.fromkeys(names)), None if is_rule else float(len(names)))


def _came(changes: Changes, part: Part) -> list[str]:
    return [name for one in changes.layers if one.part is part for name in one.came]
