"""What measures the zoo: limits, the count of values in float, the page."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.zoo.catalogue import chosen
from benchmarks.zoo.floats import left_in_float
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import OURS, PLAIN, Record, all_the_way, garbage, reached, read, stopped
from benchmarks.zoo.table import page

KEY = {"network": "timm/any", "by": OURS, "precision": "w8a8"}


def _sleeps(record: Record, folder: Path) -> None:
    with record.stage("build"):
        pass
    with record.stage("ptq"):
        time.sleep(60)


def _fills_memory(record: Record, folder: Path) -> None:
    with record.stage("build"):
        kept = bytearray(b"x" * 4_000_000_000)
        time.sleep(60)
        kept.clear()


def _is_killed(record: Record, folder: Path) -> None:
    with record.stage("build"):
        os.kill(os.getpid(), signal.SIGSEGV)


def _raises(record: Record, folder: Path) -> None:
    with record.stage("build"):
        raise ValueError("no\nsuch | thing")
    with record.stage("ptq"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "stage", "kind"),
    [(_sleeps, "ptq", "TimeLimit"), (_fills_memory, "build", "MemoryLimit"), (_is_killed, "build", "Died"),
     (_raises, "build", "ValueError")],
)  # fmt: skip
def test_however_a_measurement_ends_its_line_says_where(
    function: Callable[[Record, Path], None], stage: str, kind: str
) -> None:
    # 4 GB take a loaded machine longer than 10 seconds
    line = measured(function, KEY, limit_s=10 if kind == "TimeLimit" else 120, limit_gb=3)
    assert stopped(line) == stage
    assert line["errors"][stage]["type"] == kind
    assert reached(line) == ("build" if stage == "ptq" else "")
    assert "running" not in line
    assert not all_the_way(line)


def _graph(path: Path, *, round_the_sum: bool, round_the_constant: bool) -> Path:
    """Input → Q/DQ → Conv → Relu → Q/DQ → Add of a constant → Q/DQ."""
    nodes = []

    def rounded(name: str, made: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{made}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{made}_q", "scale", "zero"], [made]))
        return made

    nodes.append(helper.make_node("Conv", [rounded("x", "x_dq"), rounded("weight", "weight_dq")], ["conv"]))
    nodes.append(helper.make_node("Relu", ["conv"], ["relu"]))
    constant = rounded("constant", "constant_dq") if round_the_constant else "constant"
    nodes.append(helper.make_node("Add", [rounded("relu", "relu_dq"), constant], ["sum" if round_the_sum else "y"]))
    if round_the_sum:
        rounded("sum", "y")
    shape = [1, 1, 2, 2]
    tensor = helper.make_tensor
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [tensor("scale", TensorProto.FLOAT, [], [0.1]), tensor("zero", TensorProto.UINT8, [], [0]),
         tensor("weight", TensorProto.FLOAT, [1, 1, 1, 1], [1.0]), tensor("constant", TensorProto.FLOAT, [1], [2.0])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("round_the_sum", "round_the_constant", "left"),
    [(True, True, []), (False, True, ["y"]), (True, False, ["constant"]), (False, False, ["y", "constant"])],
)
def test_values_in_float_are_those_that_nothing_rounds(
    tmp_path: Path, round_the_sum: bool, round_the_constant: bool, left: list[str]
) -> None:
    path = _graph(tmp_path / "g.onnx", round_the_sum=round_the_sum, round_the_constant=round_the_constant)
    assert left_in_float(path) == left


def _line(**values: Any) -> dict[str, Any]:
    agreement = {"psnr_db": 40.0, "argmax_agreement": 1.0}
    whole = ["build", "ptq", "qat", "save", "load", "export", "emulator"]
    line: dict[str, Any] = {
        **KEY,
        "passed": whole,
        "errors": {},
        "seconds": {"all": 9.6},
        "parity": agreement,
        "emulated": agreement,
    }
    if values.get("by") != PLAIN:
        line["blame"] = {"tensors": 5, "otherwise": 0}
    line |= {"npu": 3, "cpu": 0, "islands": 0, "left_in_float": 0, "commit": "0123abc", "date": "2026-01-01"}
    return line | values


def test_the_page_counts_what_goes_all_the_way() -> None:
    failed = _line(
        network="timm/other", errors={"export": {"type": "ExportError", "message": "a | b `c`"}}, passed=["build"]
    )
    found = {"tensors": 5, "otherwise": 1}
    island = _line(network="timm/island", islands=2, parity={"psnr_db": 90.0}, blame=found)
    del failed["parity"], failed["blame"]
    plain = _line(by=PLAIN, passed=["build", "fold", "simulate", "calibrate", "qat", "export", "emulator"],
                  errors={"prepare": {"type": "TraceError", "message": "no"}}, emulated={"psnr_db": -3.0})  # fmt: skip
    text = page([_line(), failed, island, plain])
    assert [all_the_way(line) for line in (_line(), failed, island, plain)] == [True, False, False, True]
    assert [garbage(line) for line in (_line(), plain)] == [False, True]
    assert "| lightning_quant, W8A8 | 3 | 2 | 2 | **1** | 0 | 1 | 1 of 2 |" in text
    assert "| plain AIMET, W8A8 | 1 | 1 | 1 | **1** | 1 | 0 | – |" in text
    assert "| any | all the way | 3 / 0 / 0 | 0 | 40 | 0 of 5 | 40 | 10 | – | – | all the way | 3 / 0 / 0 | 0 |" in text
    assert "| island | compiled | 3 / 0 / 2 | 0 | 90 | 1 of 5 | 40 |" in text
    assert "`a / b 'c'`" in text


def test_a_later_line_of_a_measurement_replaces_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    file.write_text('{"network": "a", "precision": "w8a8", "n": 1}\n{"network": "a", "precision": "w8a8", "n": 2}\n')
    assert [line["n"] for line in read(file)] == [2]
    assert read(tmp_path / "none.jsonl") == []


def test_a_glob_without_a_network_names_them() -> None:
    assert [entry.name for entry in chosen("torch/gr?")] == ["torch/gru"]
    with pytest.raises(ValueError, match=r"'tim/' matches no network; the names are: torchvision/alexnet"):
        chosen("tim/")
