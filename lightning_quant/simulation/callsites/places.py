"""Where in the code of a network an operation stands, found fast enough to be asked for at every operation."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn

_T = TypeVar("_T")

# The code that stands where an operation is called: name, first line and position of each frame from the operation up
# to the module's forward, and the function's name.
Spot = tuple[Any, ...]
# A spot, and how many times it was reached before in this pass.
Place = tuple[Spot, int]

# Frames that pass an operation on, and those at which a module's own code begins.
_PASSING_ON: Any = (
    torch.overrides,
    torch.functional,
    nn.functional,
    torch._tensor,
    torch._jit_internal,
    torch.autograd.function,
)
_HERE = Path(__file__).parent
# All files here pass operations on, except for decompositions, which call their own.
_OURS, _DECOMPOSITIONS = str(_HERE), str(_HERE / "decompositions")
_INTERCEPTING = frozenset(str(_HERE / name) for name in ("interception.py", "watching.py", "checkpointing.py"))
_PASSES_ON = frozenset(m.__file__ for m in _PASSING_ON)
_BEGINS = frozenset((sys.modules[nn.Module.__module__].__file__, torch.utils.checkpoint.__file__))


# What a frame has to do with the place of an operation: it is part of it, the last part (what wraps a forward may take
# other ways in a trace), passes it on, has a module's own code begin above it, or both, as what intercepts it has.
_PART, _LAST, _PASSES, _BEGIN, _BOTH = range(1, 6)

# By the numbers of objects, since code compares and hashes by its contents; what is kept keeps its number.
_KINDS: dict[int, int] = {}
_SPOTS: dict[tuple[Any, ...], Spot] = {}
_KEPT: dict[int, Any] = {}
_SAME: dict[Any, Any] = {}


def spot(parent: Place | tuple[()], name: str) -> Spot:
    """Return where the operation stands that is intercepted now: for the same spot the same object.

    Args:
        parent: the place of the operation whose decomposition runs.
        name: the function's base name. It is part of the spot: one call can be of several functions, as in
            ``for act in (relu, sigmoid): act(x)``.
    """
    frame: FrameType | None = sys._getframe(2)
    key: tuple[Any, ...] = (name, id(parent))
    while frame is not None:
        code = frame.f_code
        kind = _KINDS.get(id(code)) or _kind(code)
        if kind <= _LAST:
            key += (id(code), frame.f_lasti)
            if kind == _LAST:
                break
        elif kind == _BEGIN or (kind == _BOTH and len(key) > 2):
            break
        frame = frame.f_back
    found = _SPOTS.get(key)
    return _new(key, parent) if found is None else found


def _kind(code: CodeType) -> int:
    file = code.co_filename
    if file in _INTERCEPTING:
        kind = _BOTH
    elif file in _BEGINS:
        kind = _BEGIN
    elif file in _PASSES_ON or (file.startswith(_OURS) and not file.startswith(_DECOMPOSITIONS)):
        kind = _PASSES
    else:
        kind = _LAST if code.co_name == "forward" and code.co_varnames[:1] == ("self",) else _PART
    _KEPT[id(code)] = code
    _KINDS[id(code)] = kind
    return kind


def _new(key: tuple[Any, ...], parent: Place | tuple[()]) -> Spot:
    name, _, *frames = key
    stable = (_stable(_KEPT[code], at) for code, at in zip(frames[::2], frames[1::2], strict=True))
    found = same((*parent, *stable, name))
    _KEPT[id(parent)] = parent
    _SPOTS[key] = found
    return found


def same(value: _T) -> _T:
    """Return the first spot or place that was equal to this one; it is never freed, so that its number is its own."""
    found: _T = _SAME.setdefault(value, value)
    return found


def _stable(code: CodeType, at: int) -> tuple[Any, ...]:
    """Return a frame in a form that can be pickled: name and first line of its code, and the position in the text."""
    return (code.co_qualname, code.co_firstlineno, *_position(code, at))


def _position(code: CodeType, at: int) -> tuple[int | None, ...]:
    """Return lines and columns of an instruction; its number differs by whether Python or C is called there."""
    position = next(itertools.islice(code.co_positions(), at // 2, None))
    return position if None not in position else (at,)


class CallSite(Protocol):
    """What stands at a place: it computes the operation that is called there."""

    def compute(self, running: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, or return ``NotImplemented`` to let the function do it."""


class PlacedSite:
    """A call site that knows its place.

    Args:
        name: base name of the function that is called there.
        at: the place.
    """

    def __init__(self, name: str, at: Place) -> None:
        self.name = name
        self.at = same(at)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.at = same(self.at)  # numbers of objects are of this process


class Sites(dict[Place, CallSite]):
    """The call sites of a module, by place."""

    __slots__ = ("by_name",)

    by_name: dict[str, dict[tuple[int, int], CallSite]]

    def index(self) -> dict[str, dict[tuple[int, int], CallSite]]:
        """Return the sites by the function's name, which rules out most operations; then by ids of spots and counts."""
        made: dict[str, dict[tuple[int, int], CallSite]] = {}
        for (found, count), site in self.items():
            made.setdefault(found[-1], {})[id(same(found)), count] = site
        self.by_name = made
        return made

    def __setitem__(self, at: Place, site: CallSite) -> None:
        self._forget()
        super().__setitem__(at, site)

    def clear(self) -> None:
        """Remove all."""
        self._forget()
        super().clear()

    def _forget(self) -> None:
        if hasattr(self, "by_name"):
            del self.by_name

    def __reduce__(self) -> Any:
        return Sites, (), None, None, iter(self.items())  # numbers are of this process
