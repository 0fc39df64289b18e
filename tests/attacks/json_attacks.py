"""Hostile JSON: no JSON at all, any value in the place of any other, and values that a reader has to name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from tests.attacks.attack import Attack


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
        ("device.0.jobs.compile", "javascript:alert(1)"), ("device.0.latency_us", [0]), ("device.0.tier", "a phone"),
        ("device.0.layers", {"NPU": []}), ("device.0.against_float", {}), ("surprise", 2),
    ],
    "layers": [
        ("tensors.0.scale", [2.0, 1.0]), ("tensors.0.scale", [-1.0, 1.0]), ("tensors.0.scale", [1.0]),
        ("tensors.0.scale.0", VALUES["NaN"]), ("tensors.0.low", 1e9), ("tensors.0.bins", [1.0, 0.0]),
        ("tensors.0.bits", 2**40), ("tensors.0.qmin", 2**40), ("tensors.0.counts", [-1]), ("tensors.0.clipped", 2),
        ("tensors.0.counts", None), ("tensors.0.counts", []),
        ("tensors.0.channels", 0), ("tensors.0.sqnr_db", VALUES["1e400"]), ("tensors", {}),
        ("sensitivity.0.sqnr_db", "NaN"), ("sensitivity.0.sqnr_db", VALUES["NaN"]), ("sensitivity.0.share", -1),
        ("sensitivity.0.quantizers", "abc"), ("drift", [1]), ("drift_steps", [0]), ("sensitivity.0.part", "both"),
    ],
    "errors of layers": [
        ("float.against", "device"), ("float.layers.0.lost", None), ("float.layers.0.lost", -1),
        ("float.layers.0.own.differing", VALUES["NaN"]), ("float.layers.0.own", {}), ("float.layers", {}),
        ("float.layers.1.reasons.0.cause", "bad luck"), ("float.layers.1.reasons.0.remedy.change", "all"),
        ("float.layers.1.reasons.0.channels", "abc"), ("file.output.psnr_db", "high"), ("file.samples", "two"),
    ],
    "device report": [
        ("tier", "a phone"), ("status", "well"), ("latency_us", [0]), ("latency_us", "fast"), ("memory_bytes", [2, 1]),
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
    "contract": [
        ("file", "../net.onnx"), ("file", "/etc/passwd"), ("file", ""), ("inputs", []), ("inputs.0.type", "object"),
        ("inputs.0.shape", [1, 2**31, 2**31, 3]), ("inputs.0.shape", [1, 6, 10, 2]), ("inputs.0.layout", "x"),
        ("inputs.0.std", [0, 1, 1]), ("inputs.0.mean", [0, 1]), ("inputs.0.scale", VALUES["1e400"]),
        ("inputs.0.bits", 2**40), ("outputs.0.axis", 9), ("outputs.0.axis", -1), ("outputs.0.name", ""),
        ("classes.0.color", "red;background:url(//x)"), ("classes.0.color", "#FF00000"), ("classes", [{}]),
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
