"""Values that a network takes out of PyTorch and computes with: for all samples, a file would hold those of one.

A number that only chooses a branch, or is printed, is none of these. What ``float(tensor)`` returns cannot be followed:
Python makes a plain number of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_ARRAYS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_OTHERS = (str(Path(str(torch.__file__)).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class ReadOut:
    """A place in the code that takes values out of PyTorch.

    Args:
        function: what takes them, e.g. ``"numpy"``.
        file: name of the source file.
        line: in that file.
    """

    function: str
    file: str
    line: int

    @classmethod
    def by(cls, func: Any) -> ReadOut | None:
        """Return the place in the user's code that calls a function now; ``None`` if it takes no values out."""
        if func not in _ARRAYS and func is not Tensor.item:
            return None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_OTHERS):
            frame = frame.f_back
        file, line = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)
        return cls(func.__name__.strip("_"), Path(file).name, line)


class ReadNumber(float):
    """A number that was taken out of PyTorch, and what Python computes of it; it knows its place."""

    place: ReadOut

    @classmethod
    def at(cls, value: float, place: ReadOut) -> ReadNumber:
        """Make one of a number."""
        made = cls(value)
        made.place = place
        return made


def _following(name: str) -> Any:
    plain = getattr(float, name)

    def compute(self: ReadNumber, *others: Any) -> Any:
        result = plain(self, *others)
        return ReadNumber.at(result, self.place) if isinstance(result, float) else result

    return compute


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "abs"):
    setattr(ReadNumber, f"__{_name}__", _following(f"__{_name}__"))


def without_places(args: Any, kwargs: Any) -> tuple[Any, Any, list[ReadOut]]:
    """Return arguments with plain numbers, and the places of those that were taken out of PyTorch."""
    places = [value.place for value in (*args, *kwargs.values()) if isinstance(value, ReadNumber)]
    if not places:
        return args, kwargs, places
    plain = {name: float(value) if isinstance(value, ReadNumber) else value for name, value in kwargs.items()}
    return tuple(float(value) if isinstance(value, ReadNumber) else value for value in args), plain, places
