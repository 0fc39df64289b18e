"""Hostile archives: arrays (``.npz``), checkpoints, and what a checkpoint says of its quantization."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tests.attacks.attack import MARKER, Attack, Code


def npy(array: np.ndarray | None = None, header: str = "", body: bytes = b"") -> bytes:
    """A member of an archive: an array, or any header with any body."""
    stream = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(stream, array, allow_pickle=True)
        return stream.getvalue()
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + body


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return stream.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    """What a zip holds, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def npz_attacks(genuine: bytes) -> Iterator[Attack]:
    """Archives of arrays."""
    members = members_of(genuine)
    name = next(one for one, data in members.items() if len(data) > 200)

    def header(shape: str, descr: str = "'<f4'") -> bytes:
        return npy(header=f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}", body=bytes(64))

    code = npy(np.array([Code()], dtype=object))
    swapped = {
        "objects with code": code,
        "a pickle with code": pickle.dumps(Code()),
        "2**40 numbers": header(f"({2**40},)"),
        "10**1000 numbers": header(f"({10**1000},)"),
        "empty text 2**40 times": header(f"({2**40},)", "'<U0'"),
        "a negative shape": header("(-4, -4)"),
        "lists without end": npy(header="[" * 5000),
        "a header that is code": npy(header=f"open({str(MARKER)!r}, 'w')"),
        "the other byte order": npy(np.zeros((2, 2), ">f4")),
        "NaN where text is": b"nan",
    }
    for what, data in swapped.items():
        yield Attack(what, archive({**members, name: data}), "")
    bomb = npy(np.zeros(2**26, np.float32))
    yield Attack("a bomb", archive({**members, name: bomb}, zipfile.ZIP_DEFLATED), "compressed")
    yield Attack("one member twice over", overlapping(archive({name: members[name]}), 50), "")
    yield Attack("no members", archive({}), "")
    yield Attack("empty", b"", "")


def sample_attacks(genuine: bytes) -> Iterator[Attack]:
    """Names of samples that are none."""
    members = members_of(genuine)
    for other in (
        "../../x.npy",
        "/tmp/x.npy",
        "inputs/-1/x.npy",
        "inputs/1e400/x.npy",
        f"inputs/{10**30}/x.npy",
        "x.npy",
    ):
        yield Attack(f"named {other}", archive({**members, other: npy(np.zeros(2))}), other.removesuffix(".npy")[:9])


def overlapping(data: bytes, times: int) -> bytes:
    """The one member of a zip listed many times under other names, with no more bytes for it."""
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    entry = data[start:end]
    entries = b"".join(entry[:46] + entry[46:] for _ in range(times))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, times, times, len(entries), start, 0)
    return data[:start] + entries + tail


def saved(content: Any, legacy: bool = False) -> bytes:
    """What ``torch.save`` makes of it."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def deflated(data: bytes, grow: int) -> bytes:
    """A checkpoint with its members compressed, and the largest of them grown by so many zeros."""
    members = members_of(data)
    largest = max(members, key=lambda name: len(members[name]))
    members[largest] += bytes(grow)
    return archive(members, zipfile.ZIP_DEFLATED)


def checkpoint_attacks(genuine: bytes) -> Iterator[Attack]:
    """Checkpoints of any kind."""
    content = torch.load(io.BytesIO(genuine), weights_only=True)
    members = members_of(genuine)
    (data_pkl,) = (name for name in members if name.endswith("data.pkl"))

    def edited(**values: Any) -> bytes:
        return saved({**content, **values})

    state = content["state_dict"]
    first = next(name for name, value in state.items() if isinstance(value, torch.Tensor))
    yield Attack("code", saved({**content, "extra": Code()}), "")
    yield Attack("code in the old format", saved({**content, "extra": Code()}, legacy=True), "")
    yield Attack("a bare pickle", pickle.dumps({"state_dict": Code()}), "")
    yield Attack("a pickle in the archive", archive({**members, data_pkl: pickle.dumps(Code())}), "")
    yield Attack("a bomb", deflated(genuine, 2**28), "compressed")
    yield Attack("a storage of 2**40 numbers", archive({**members, data_pkl: claiming(members[data_pkl])}), "")
    yield Attack("empty", b"", "")
    yield Attack("no archive", b"PK\x03\x04" + bytes(100), "")
    yield Attack("no state", edited(state_dict=None), "")
    yield Attack("a list for the state", edited(state_dict=[1]), "")
    yield Attack("a name that is none", edited(state_dict={**state, 3: torch.ones(2)}))
    yield Attack(
        "a shape of 2**40", edited(state_dict={**state, first: torch.ones(1).expand(2**40)}), first.partition(".")[2]
    )
    yield Attack("a text for weights", edited(state_dict={**state, first: "text"}), first.partition(".")[2])


def claiming(pickled: bytes) -> bytes:
    """A checkpoint's pickle in which the first storage says that it holds 2**30 numbers."""
    at = pickled.index(b"cpu") + 3
    while pickled[at : at + 1] not in (b"K", b"M", b"J"):
        at += 1
    length = {b"K": 1, b"M": 2, b"J": 4}[pickled[at : at + 1]]
    return pickled[:at] + b"J" + struct.pack("<i", 2**30) + pickled[at + 1 + length :]


def manifest_attacks(genuine: bytes) -> Iterator[Attack]:
    """What a checkpoint says of its quantization, and the ranges in it."""
    content = torch.load(io.BytesIO(genuine), weights_only=True)
    state = content["state_dict"]
    key = "model._extra_state"
    values: list[tuple[str, Any]] = [
        ("format_version", 9), ("format_version", None), ("format_version", 10**9999), ("format_version", [1]),
        ("format_version", torch.ones(3)), ("precision", 8), ("precision", "w1a1"), ("precision", torch.ones(2)),
        ("hardware", "/etc/own.json"), ("hardware", ["htp_v75"]), ("overrides", [1]), ("overrides", {"head": 8}),
        ("range_estimator", {}), ("range_estimator", "best"), ("calibrated", "yes"), ("raised", [1]),
        ("raised", {"head": "w9a9"}), ("inputs", []), ("inputs", {"args": [], "kwargs": []}), ("float_sha256", 3),
        ("inputs", {"args": [{"tensor": [2**40], "dtype": "float32"}], "kwargs": {}}),
        ("inputs", {"args": [{"tensor": [2**14, 2**15], "dtype": "float32"}], "kwargs": {}}),
        ("inputs", {"args": [{"tensor": [10**1000], "dtype": "float32"}], "kwargs": {}}),
        ("inputs", {"args": [{"tensor": [-1, -3], "dtype": "float32"}], "kwargs": {}}),
        ("inputs", {"args": [{"tensor": [1, 3, 8, 8], "dtype": "load"}], "kwargs": {}}),
        ("inputs", {"args": [nested(200)], "kwargs": {}}),
    ]  # fmt: skip
    for name, value in values:
        try:
            what = f"{name}={value!s:.50}"
        except (ValueError, RecursionError):
            what = f"{name} of no length"
        yield Attack(
            what,
            saved({**content, "state_dict": {**state, key: {**state[key], name: value}}}),
            "" if "1000" in what or "length" in what else name,
        )
    ends = [name for name, value in state.items() if name.endswith(".min") and isinstance(value, torch.Tensor)]
    for what, number in {"NaN": float("nan"), "infinite": float("inf")}.items():
        changed = {**state, ends[-1]: torch.full_like(state[ends[-1]], number)}
        yield Attack(f"a range {what}", saved({**content, "state_dict": changed}), ends[-1].split(".")[-2])
    grid = next(name for name, value in state.items() if "quantizer" in name and name.endswith("._extra_state"))
    changes: dict[str, dict[str, Any]] = {
        "bits": {"qmax": torch.tensor(2**40)},
        "text": {"qmax": "x"},
        "blocks": {"block_size": [2**40]},
    }
    for what, change in changes.items():
        changed = {**state, grid: {**state[grid], **change}}
        yield Attack(
            f"a grid of {what}", saved({**content, "state_dict": changed}), "" if what == "text" else "The grid of"
        )
    hyper = {"_instantiator": "tests.attacks.attack.instantiate", "network": {"class_path": "antigravity.fly"}}
    yield Attack("a function that is called", saved({**content, "hyper_parameters": hyper}))
    cli = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "tests.helpers.small.SmallModule",
    }
    yield Attack("a class that is imported", saved({**content, "hyper_parameters": {**hyper, **cli}}))


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = {"value": 1}
    for _ in range(depth):
        value = {"list": [value]}
    return value


def statistics_attacks(genuine: bytes) -> Iterator[Attack]:
    """Ranges that were never seen."""
    with np.load(io.BytesIO(genuine)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = next(one for one in arrays if one.endswith("|min"))

    def edited(**values: Any) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **{**arrays, **values})
        return stream.getvalue()

    for what, value in {
        "NaN": np.full_like(arrays[name], np.nan),
        "upside down": np.full_like(arrays[name], 1e9),
        "of another shape": np.zeros((7, 7), np.float32),
        "of text": np.array("text"),
    }.items():
        yield Attack(f"a range {what}", edited(**{name: value}), "")
    yield Attack("negative samples", edited(samples=-1), "")
    yield Attack("samples as text", edited(samples="8"), "")
    yield Attack("no data", edited(data=3), "")
