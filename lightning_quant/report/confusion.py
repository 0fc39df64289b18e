"""A confusion matrix: how often samples of each class were taken for each other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_quant.utilities.parsing import check, parse_as

MOST_CLASSES = 200
"""Of more classes a page cannot show a matrix: its cells are smaller than pixels of a phone."""


@dataclass(frozen=True)
class Confusion:
    """Counts of samples by their class and by the class that a network predicted.

    Args:
        classes: their names, 2 to 200 that are all different.
        counts: (C, C), each 0 or more: rows are labels and columns predictions, in the order of ``classes``.

    Raises:
        FieldError: when something else is given.
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        names = len(self.classes)
        check(2 <= names <= MOST_CLASSES, "the number of classes", names, f"2 to {MOST_CLASSES}")
        check(len(set(self.classes)) == names, "classes", self.classes, "names that are all different")
        square = len(self.counts) == names and all(len(row) == names for row in self.counts)
        shape = (len(self.counts), *sorted({len(row) for row in self.counts}))
        check(square, "the shape of the counts", shape, f"({names}, {names}), one row and one column for each class")
        least = min(min(row) for row in self.counts)
        check(least >= 0, "the least count", least, "0 or more")

    @classmethod
    def of(cls, classes: Sequence[str], counts: Any) -> Confusion:
        """Return the matrix of a table of counts: nested lists, an array or a tensor.

        Raises:
            FieldError: when it is no square table of whole numbers for these classes.
        """
        rows = counts.tolist() if hasattr(counts, "tolist") else counts
        # a metric's state may be of floats
        plain = [
            [int(count) if isinstance(count, float) and count.is_integer() else count for count in r] for r in rows
        ]
        names = tuple(map(str, classes))
        return cls(names, parse_as(plain, tuple[tuple[int, ...], ...], "counts"))

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Confusion:
        """Return what :meth:`to_json` made into JSON.

        Raises:
            FieldError: naming the place that does not fit.
        """
        rows = parse_as(value, dict[str, dict[str, int]], where)
        for label, row in rows.items():
            check(row.keys() <= rows.keys(), f"{where}.{label[:60]}", list(row), "names of classes, each with a row")
        return cls(tuple(rows), tuple(tuple(row.get(name, 0) for name in rows) for row in rows.values()))

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts above 0 by label and by prediction."""
        return {
            label: {name: count for name, count in zip(self.classes, row, strict=True) if count}
            for label, row in zip(self.classes, self.counts, strict=True)
        }
