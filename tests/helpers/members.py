"""Members of a kind of which the suite runs some, and `make torture` all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def in_turn(first: Iterable[Any], *others: Iterable[Any]) -> list[Any]:
    """Return all combinations for ``pytest.mark.parametrize``; all but one for each value of the first are torture.

    That one has the combinations of the others in turn, so each of these is run as well.
    """
    firsts, combinations = list(first), list(product(*others))
    assert len(firsts) >= len(combinations)
    return [
        pytest.param(value, *others, marks=() if at == index % len(combinations) else pytest.mark.torture)
        for index, value in enumerate(firsts)
        for at, others in enumerate(combinations)
    ]
