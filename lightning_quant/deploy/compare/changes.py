"""What can be found: each kind of difference, and a bound that is not kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lightning_quant.deploy.compare.bounds import Bound, Part
from lightning_quant.deploy.compare.snapshot import Constant, Grid, Operation


class How(Enum):
    """What became of something that both networks would have."""

    CHANGED = "changed"
    ADDED = "added"
    GONE = "gone"
    LOST = "lost"


@dataclass(frozen=True)
class Stated:
    """A version, or an entry of the recipe, that is another one.

    Args:
        part: what it belongs to.
        name: what it is of.
        old: as text; ``None`` where it was not stated.
        new: likewise.
    """

    part: Part
    name: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Figure:
    """A number, whether or not it is another one.

    Args:
        part: what it belongs to.
        name: what it is of, such as a device or a class.
        old: ``None`` where it was not measured.
        new: likewise.
        worse: how much worse it became, in its own unit; negative if better, ``None`` where one is not known.
        amount: the same in the unit of the bound, if there is one.
        exceeds: whether that is more than the bound allows, or it is not measured any more.
    """

    part: Part
    name: str
    old: float | None
    new: float | None
    worse: float | None = None
    amount: float | None = None
    exceeds: bool = False


@dataclass(frozen=True)
class LayersMoved:
    """Layers that came to a compute unit of a device, or left it.

    Args:
        part: what it belongs to; ``None`` for units that no bound is on.
        device: where.
        unit: ``"CPU"``, ``"GPU"``, or ``"float"`` for layers on the NPU that compute in float.
        came: names of the layers that are there now and were not before.
        left: names of those that were.
    """

    part: Part | None
    device: str
    unit: str
    came: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class OperationChange:
    """A node of the graphs that is another one.

    Args:
        name: of the node.
        graphs: in which of the bundle's graphs.
        how: ``CHANGED`` for another type, other attributes or other inputs.
        old: ``None`` where it was added.
        new: ``None`` where it is gone.
    """

    name: str
    graphs: tuple[str, ...]
    how: How
    old: Operation | None
    new: Operation | None


@dataclass(frozen=True)
class EncodingChange:
    """A tensor that is rounded to another grid.

    Args:
        tensor: name in the graph.
        graphs: in which of the bundle's graphs.
        how: whether it is rounded in both.
        old: the grid before.
        new: the grid now.
        ratio: the scale now over the scale before, the smallest and the largest over the channels.
        offset: by how many integers the offset moved, likewise.
        channels: how many of the channels changed; ``None`` where only summaries are known.
    """

    tensor: str
    graphs: tuple[str, ...]
    how: How
    old: Grid | None
    new: Grid | None
    ratio: tuple[float, float] | None = None
    offset: tuple[float, float] | None = None
    channels: int | None = None


@dataclass(frozen=True)
class ConstantChange:
    """A parameter, or another constant, with other values.

    Args:
        name: in the graph.
        graphs: in which of the bundle's graphs.
        how: ``LOST`` for a parameter that is gone, or that is 0 throughout and was not.
        old: summary of the values before.
        new: summary of the values now.
        share: of the values that are others; ``None`` where only summaries are known.
        steps: the largest change, in integers, or for floats in parts of the largest value; ``None`` likewise.
    """

    name: str
    graphs: tuple[str, ...]
    how: How
    old: Constant | None
    new: Constant | None
    share: float | None = None
    steps: float | None = None


@dataclass(frozen=True)
class Known:
    """What the two networks are known to have in common: of which a difference cannot come.

    Args:
        versions: all packages that make a bundle.
        recipe: everything in it.
        float_weights: ``None`` where a hash is missing.
        trained: whether the networks were trained, or made from other configurations, as far as is known.
        files: every file of the bundle, to the bit.
        device_versions: the tools of all devices.
        samples: as many samples on each device, and for the parity.
    """

    versions: bool
    recipe: bool
    float_weights: bool | None
    trained: bool
    files: bool
    device_versions: bool
    samples: bool

    @property
    def explains(self) -> bool:
        """Whether something is recorded that makes other encodings and weights."""
        return not self.versions or not self.recipe or self.float_weights is False or self.trained


@dataclass(frozen=True)
class Exceeded:
    """A bound that is not kept.

    Args:
        bound: which.
        names: what exceeds it, the worst first.
        worst: how much worse the first one is, in the unit of the bound; for counts, how many there are. ``None`` for
            rules, and for what is not measured any more.
        missing: whether the first one is not measured any more.
    """

    bound: Bound
    names: tuple[str, ...]
    worst: float | None = None
    missing: bool = False
