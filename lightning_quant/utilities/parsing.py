"""Reading files that somebody else may have written: within bounds, checked field by field, without running code."""

from __future__ import annotations

import json
import math
import pickle
import reprlib
import types
import typing
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

# Python's objects take some twenty times the room of the text they are read from.
_MOST_JSON_BYTES = 2**25
_DEEPEST = 64
_LARGEST_INT = 2**63 - 1

_PLAIN: dict[Any, str] = {
    int: f"a whole number within ±{_LARGEST_INT}",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


class FieldError(ValueError):
    """A value is not what its place asks for; the message names the place, the value and what is expected."""

    def __init__(self, where: str, value: Any, expected: str) -> None:
        super().__init__(f"{where or 'the whole'} is {short_repr(value)}, expected {expected}")


def short_repr(value: Any) -> str:
    """Return a value of any kind and size in a few characters."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # such as whole numbers of thousands of digits
        return f"a {type(value).__name__}"


def read_json(path: Path, most_bytes: int = _MOST_JSON_BYTES) -> Any:
    """Return the content of a JSON file.

    Args:
        path: of the file.
        most_bytes: that it may have.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is not JSON, too large or nested too deeply.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes >> 20} MB, expected less")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"it is nested too deeply, expected at most {_DEEPEST} levels") from None


def parse_as(value: Any, kind: Any, where: str = "") -> Any:
    """Return a value of the annotated ``kind``: dicts become dataclasses, lists become tuples where it says so.

    Args:
        value: what JSON or a checkpoint held.
        kind: an annotation: plain types, ``Literal``, enums by value, dataclasses, ``list``, ``tuple``, ``dict``,
            ``X | None`` or ``Any``. A class with a class method ``from_json(value, where)`` is made by that.
        where: name of the place, for the message.

    Raises:
        FieldError: naming the first place that does not fit.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_plain(value, where, _DEEPEST)
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (other,) = (part for part in parts if part is not type(None))
        return parse_as(value, other, where)
    if origin is Literal:
        check(value in parts, where, value, " or ".join(map(str, parts)))
        return value
    if isinstance(kind, EnumType):
        members: list[Any] = list(kind)
        names = [one.value for one in members]
        check(value in names, where, value, f"one of {', '.join(map(str, names))}")
        return kind(value)
    if hasattr(kind, "from_json"):
        return kind.from_json(value, where)
    if is_dataclass(kind):
        return parse_fields(value, kind, where)
    if origin in (dict, Mapping):
        items = _of(dict, value, where, "names with values")
        return {
            parse_as(key, parts[0], f"a name in {where or 'the whole'}"): parse_as(item, parts[1], _at(where, key))
            for key, item in items.items()
        }
    if origin is tuple and parts[-1] is not Ellipsis:
        items = _of((list, tuple), value, where, f"a list of {len(parts)}")
        if len(items) != len(parts):
            raise FieldError(where, value, f"a list of {len(parts)}")
        return tuple(
            parse_as(item, part, _at(where, at)) for at, (item, part) in enumerate(zip(items, parts, strict=True))
        )
    if origin in (list, tuple, Sequence):
        items = _of((list, tuple), value, where, "a list")
        return (tuple if origin is tuple else list)(
            parse_as(item, parts[0], _at(where, at)) for at, item in enumerate(items)
        )
    _check_scalar(value, kind, where)
    return value


def parse_fields(value: Any, kind: Any, where: str = "") -> Any:
    """Make a dataclass of a dict with its fields: :func:`parse_as` for one without ``from_json``, or within that."""
    given = _of(dict, value, where, "names with values")
    hints = typing.get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}
    for name in given:
        if name not in known:
            raise FieldError(_at(where, name), given[name], "no such field")
    for name, one in known.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise FieldError(_at(where, name), None, "the field to be there")
    return kind(**{name: parse_as(item, hints[name], _at(where, name)) for name, item in given.items()})


def _of(kind: Any, value: Any, where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise FieldError(where, value, expected)
    return value


def _at(where: str, key: Any) -> str:
    return f"{where}.{short_repr(key) if not isinstance(key, str) else key[:60]}".removeprefix(".")


def _check_scalar(value: Any, kind: Any, where: str) -> None:
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if fits and type(value) is int:
        fits = abs(value) <= _LARGEST_INT
    if fits and isinstance(value, str):
        fits = value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if not fits:
        raise FieldError(where, value, _PLAIN[kind])


def _check_plain(value: Any, where: str, deepest: int) -> None:
    if deepest == 0:
        raise FieldError(where[:60], value, f"at most {_DEEPEST} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_scalar(key, str, f"a name in {where or 'the whole'}")
            _check_plain(item, _at(where, key), deepest - 1)
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            _check_plain(item, _at(where, at), deepest - 1)
    elif type(value) in _PLAIN:
        _check_scalar(value, type(value), where)
    else:
        raise FieldError(where, value, "plain values")


def check(holds: bool, where: str, value: Any, expected: str) -> None:
    """Refuse a value of the right type that cannot be.

    Raises:
        FieldError: unless ``holds``.
    """
    if not holds:
        raise FieldError(where, value, expected)


def check_version(values: Any, version: int) -> None:
    """Refuse what is not a dict, or is of another format.

    Raises:
        ValueError: with the format found.
    """
    given = _of(dict, values, "", "names with values").get("format_version")
    if type(given) is not int or given != version:
        raise ValueError(f"it has format_version={short_repr(given)}; this version reads {version}")


def is_finite(*values: float) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(map(math.isfinite, values))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read numbers and text from an ``.npz`` file that ``numpy.savez`` wrote: no objects, nothing compressed.

    So it takes no more memory than the file has bytes, whatever its members declare.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is damaged, naming the member.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_header(stream, member)
                with archive.open(member) as stream:
                    found[member.filename.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, FieldError):
        raise
    except Exception as error:  # a damaged member fails with whatever its bytes happen to mean
        raise ValueError(f"it is not an archive of arrays: {type(error).__name__}: {error}") from error
    return found


def _check_header(stream: Any, member: zipfile.ZipInfo) -> None:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[version](stream)
    plain = dtype.kind in "biufU" and dtype.isnative and dtype.itemsize > 0
    check(plain, f"{member.filename}.dtype", str(dtype), "numbers or text")
    holds = math.prod(shape) * dtype.itemsize == member.file_size - stream.tell()
    check(holds and min(shape, default=0) >= 0, f"{member.filename}.shape", shape, "the shape of what it holds")


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    members = archive.infolist()
    for member in members:
        check(member.compress_type == zipfile.ZIP_STORED, member.filename, "compressed", "it as it is")
    total = sum(member.file_size for member in members)
    check(total <= path.stat().st_size, "the size of its members", total, "no more than the file has")


def read_checkpoint(path: Path) -> Any:
    """Read what ``torch.save`` wrote, on the CPU: tensors and plain values, no code, nothing compressed.

    Raises:
        Exception: of any class, by where the damage is; :class:`pickle.UnpicklingError` for anything but tensors and
            plain values.
    """
    import torch  # a report needs none

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch advises to switch the safety off
        said = str(error).partition("WeightsUnpickler error:")[2] or str(error).partition("(1)")[0]
        raise pickle.UnpicklingError(" ".join(said.split())[:500] or type(error).__name__) from None
