"""Hostile files, made by damaging genuine ones: each with what the refusal has to name."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MARKER = Path("marker-of-code-that-ran")


@dataclass(frozen=True)
class Attack:
    """A hostile file.

    Args:
        name: what it tries.
        data: its bytes.
        field: what the message names beside the file, if the file must be refused; ``None``: it may be read.
    """

    name: str
    data: bytes
    field: str | None = None


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (MARKER,)


class Literal:
    """JSON as it is written, for what Python would not write."""

    def __init__(self, text: str) -> None:
        self.text = text


def as_json(content: Any) -> bytes:
    """JSON with :class:`Literal` in it."""
    literals: list[str] = []

    def place(value: Any) -> str:
        assert isinstance(value, Literal)
        literals.append(value.text)
        return f"@literal{len(literals) - 1}@"

    text = json.dumps(content, default=place)
    for index, literal in enumerate(literals):
        text = text.replace(f'"@literal{index}@"', literal)
    return text.encode()


# In the place of any value.
VALUES: dict[str, Any] = {
    "null": None,
    "negative": -1,
    "zero": 0,
    "1e400": Literal("1e400"),
    "10**1000": Literal("1" + "0" * 1000),
    "10**9999": Literal("1" + "0" * 9999),
    "2**40": 2**40,
    "NaN": Literal("NaN"),
    "text": "text",
    "number as text": "1",
    "half a letter": "\ud800",
    "path": "../../x",
    "link": "javascript:alert(1)",
    "expression": "${oc.env:HOME}",
    "list": [],
    "dict": {},
    "lists in lists": Literal("[" * 300 + "]" * 300),
    "true": True,
}


def paths_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document; of long lists to the first two."""
    yield path
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield from paths_in(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with one value replaced."""
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def without(content: Any, path: tuple[Any, ...]) -> Any:
    """A copy of a document with one value left out."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return content


def json_attacks(genuine: bytes) -> Iterator[Attack]:
    """What no JSON file is read with, whatever it holds."""
    yield Attack("empty", b"", "")
    yield Attack("cut", genuine[: len(genuine) // 2], "")
    yield Attack("a bit flipped", bytes([genuine[0] ^ 0x10]) + genuine[1:], "")
    yield Attack("no text", b"\xff\xfe\x00\x80", "")
    yield Attack("lists without end", b"[" * 200_000, "deep")
    yield Attack("dicts without end", b'{"a":' * 200_000, "deep")
    yield Attack("a number of a million digits", b"1" * 1_000_000, "")
    yield Attack("too large", genuine + b" " * 2**25, "MB")
    yield Attack("a list", b"[]", "")
    yield Attack("a number", b"3", "")
    yield Attack("null", b"null", "")
    yield Attack("text", b'"text"', "")
    if "format_version" in (content := json.loads(genuine)):
        for name in ("null", "10**1000", "text", "list", "NaN", "true"):
            yield Attack(
                f"version {name}", as_json(replaced(content, ("format_version",), VALUES[name])), "format_version"
            )
        yield Attack("version 9", as_json({**content, "format_version": 9}), "format_version")
        yield Attack("version missing", as_json(without(content, ("format_version",))), "format_version")


def value_attacks(genuine: bytes) -> Iterator[Attack]:
    """Every value replaced by everything, and left out; some of it may be read."""
    content = json.loads(genuine)
    for path in paths_in(content):
        where = ".".join(map(str, path))
        for name, value in VALUES.items():
            yield Attack(f"{where}: {name}", as_json(replaced(content, path, value)))
        if path:
            yield Attack(f"{where} missing", as_json(without(content, path)))


# For single readers: the way to a value, what is put there; the refusal has to name the last part.
FIELDS: dict[str, list[tuple[str, Any]]] = {
    "record": [
        ("metric.float", "0.7"), ("metric", []), ("exported", "nothing"), ("mode", "best"), ("status", "well"),
        ("bytes.quantized", 0), ("bytes.quantized", -1), ("bytes.quantized", VALUES["10**1000"]),
        ("bytes", {"float": 1}),
        ("ladder.rungs", {}), ("ladder.rungs.0.metric", "high"), ("ladder.rungs.0.rung", "cle"),
        ("ladder.mode", "best"),
        ("parity.psnr_db", "high"), ("artifacts", None), ("config.seed", VALUES["lists in lists"]), ("model", "\ud800"),
        ("device.0.jobs.compile", "javascript:alert(1)"), ("device.0.latency_us", [0]), ("device.0.tier", "phone"),
        ("device.0.layers", {"NPU": []}), ("device.0.against_float", {}), ("surprise", 2),
    ],
    "layers": [
        ("tensors.0.scale", [2.0, 1.0]), ("tensors.0.scale", [-1.0, 1.0]), ("tensors.0.scale", [1.0]),
        ("tensors.0.scale.0", VALUES["NaN"]), ("tensors.0.low", 1e9), ("tensors.0.bins", [1.0, 0.0]),
        ("tensors.0.bits", 2**40), ("tensors.0.qmin", 2**40), ("tensors.0.counts", [-1]), ("tensors.0.clipped", 2),
        ("tensors.0.counts", None), ("tensors.0.channels", 0), ("tensors.0.sqnr_db", VALUES["1e400"]), ("tensors", {}),
        ("sensitivity.0.sqnr_db", "NaN"), ("sensitivity.0.sqnr_db", VALUES["NaN"]), ("sensitivity.0.share", -1),
        ("sensitivity.0.quantizers", "abc"), ("drift", [1]), ("drift_steps", [0]), ("sensitivity.0.part", "both"),
    ],
    "device report": [
        ("tier", "phone"), ("status", "well"), ("latency_us", [0]), ("latency_us", "fast"), ("memory_bytes", [2, 1]),
        ("memory_bytes", []), ("layers", {"NPU": []}), ("jobs.compile", "javascript:alert(1)"), ("samples", -1),
        ("against_float.psnr_db", "high"), ("latency_us.0", VALUES["10**1000"]), ("device", None), ("bytes.float", 1.5),
    ],
    "journal": [
        ("entries", []), ("entries.compile-abc", []), ("entries.compile-abc.attempt", "two"),
        ("entries.compile-abc.attempt", -1), ("entries.model-abc.id", 3), ("entries.model-abc.id", {}),
    ],
    "manifest": [
        ("files", []), ("files", {}), ("files.net.onnx", []), ("files.net.onnx.sha256", None), ("precision", "w1a1"),
        ("precision", 8), ("overrides", []), ("raised", {"head": "w99a99"}), ("input_names", "x"),
        ("output_names", [1]),
        ("bytes", {"float": "large"}), ("files.../../secret", {"sha256": "0" * 64}),
        ("files./etc/passwd", {"sha256": "0" * 64}),
    ],
    "request": [
        ("target", "../x"), ("target", []), ("devices", "phone"), ("timeout", -1), ("timeout", VALUES["1e400"]),
        ("timeout", "60"), ("options", []), ("options.profile", ["x"]), ("options.poll_seconds", "1"),
        ("options.unknown", 1), ("options.runtimes", [1]),
    ],
    "AI Hub's result": [
        ("results.0.profile.execution_summary", None), ("results.0.profile.execution_summary.all_inference_times", [0]),
        ("results.0.profile.execution_summary.all_inference_times", ["fast"]),
        ("results.0.jobs.compile", "javascript:1"),
        ("results.0.profile.execution_detail", [{}]), ("results.0.status", "well"), ("results", 3),
    ],
}  # fmt: skip


def field_attacks(reader: str, genuine: bytes) -> Iterator[Attack]:
    """Values that are refused, and have to be named."""
    for where, value in FIELDS.get(reader, []):
        head, _, tail = where.partition(".")
        path: tuple[Any, ...] = (head, tail) if head == "files" and tail else tuple(where.split("."))
        if head == "files" and tail.endswith(".sha256"):
            path = (head, tail.removesuffix(".sha256"), "sha256")
        path = tuple(int(part) if part.isdecimal() else part for part in path)
        named = next(str(part) for part in reversed(path) if not isinstance(part, int))
        data = as_json(replaced(json.loads(genuine), path, value))
        yield Attack(
            f"{where}={getattr(value, 'text', value)!s:.40}", data, "" if reader == "AI Hub's result" else named
        )


def damage(genuine: bytes, seed: int = 0, count: int = 40) -> Iterator[Attack]:
    """A binary file cut at some lengths and with some bits flipped."""
    generator = random.Random(seed)
    for length in sorted(generator.sample(range(len(genuine)), count // 2)):
        yield Attack(f"cut at {length}", genuine[:length])
    for _ in range(count):
        at = generator.randrange(len(genuine))
        yield Attack(
            f"byte {at} flipped", genuine[:at] + bytes([genuine[at] ^ 1 << generator.randrange(8)]) + genuine[at + 1 :]
        )


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
    hyper = {"_instantiator": "tests.attacks.corpus.instantiate", "network": {"class_path": "antigravity.fly"}}
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


def instantiate(*_: Any) -> None:
    """What a checkpoint must not have called."""
    MARKER.touch()


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


def picture_attacks(genuine: bytes) -> Iterator[Attack]:
    """Pictures."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int, data: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    yield Attack("huge", png(2**31 - 1, 2**31 - 1, zlib.compress(b"")), "")
    yield Attack("large and cut", png(2**15, 2**14, zlib.compress(b"")), "")
    yield Attack("a bomb", png(30_000, 30_000, zlib.compress(bytes(10**7))), "")
    yield Attack("no pixels", png(0, 0, zlib.compress(b"")), "")
    yield Attack(
        "text that unfolds", genuine[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) + genuine[33:], ""
    )
    yield Attack("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\n", "")
    yield Attack("empty", b"", "")
    yield Attack("no picture", b"GIF89a" + bytes(20), "")


def onnx_attacks(genuine: bytes) -> Iterator[Attack]:
    """Files that are hashed: any change is one."""
    yield Attack("empty", b"", "")
    yield Attack("a bit flipped", genuine[:-1] + bytes([genuine[-1] ^ 1]), "")
    yield Attack("twice", genuine * 2, "")


BINARY: dict[str, tuple[Callable[[bytes], Iterator[Attack]], ...]] = {
    "samples": (npz_attacks, sample_attacks),
    "AI Hub's outputs": (npz_attacks,),
    "checkpoint": (checkpoint_attacks, manifest_attacks),
    "float checkpoint": (checkpoint_attacks,),
    "weights": (checkpoint_attacks,),
    "statistics": (npz_attacks, statistics_attacks),
    "photograph": (picture_attacks,),
    "labels": (picture_attacks,),
    "picture in a report": (picture_attacks,),
    "model": (onnx_attacks,),
    "encodings": (onnx_attacks,),
}


def corpus(reader: str, genuine: bytes, slow: bool) -> Iterator[Attack]:
    """Every attack on a reader."""
    if reader in BINARY:
        for make in BINARY[reader]:
            yield from make(genuine)
        yield from damage(genuine, count=10 if slow else 100)
        return
    yield from json_attacks(genuine)
    yield from field_attacks(reader, genuine)
    if not slow:
        yield from value_attacks(genuine)
