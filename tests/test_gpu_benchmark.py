"""The benchmark on a GPU loses nothing it has measured: what fails is written down, and the rest still runs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import Card, Case, Turns, cases, measured, rendered

CPU = torch.device("cpu")


def test_a_variant_that_fails_leaves_the_others_their_turns() -> None:
    turns = Turns(CPU, turn=1e-3, rounds=3, seconds=1)
    calls = {"from the start": 0, "later": 0}

    def failing(name: str, after: int) -> Any:
        def step() -> None:
            calls[name] += 1
            if calls[name] > after:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    steps = {"from the start": failing("from the start", 0), "good": lambda: None, "later": failing("later", 4)}
    assert turns.medians(steps).keys() == {"good"}
    assert turns.errors == dict.fromkeys(("from the start", "later"), "OutOfMemoryError: CUDA out of memory")
    assert turns.attempt("later", lambda: 1) is None


def test_a_row_that_fails_is_written_with_its_reason(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    arguments = argparse.Namespace(device="cpu", turn=1e-3, rounds=2, turns_seconds=1, variants=None)

    def save(row: dict[str, Any] | None = None) -> None:
        rows.extend([] if row is None else [row])
        (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))

    measured(Case("step", "no_such_network", (8, 8), 2), arguments, False, Card(None), save)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["error"].startswith("KeyError: 'no_such_network'")
    facts = dict.fromkeys(("card", "torch", "aimet", "commit", "date"), "")
    assert "KeyError: 'no_such_network'" in rendered({**facts, "rows": [row]})


def test_the_first_rows_are_those_that_count() -> None:
    first = cases(["resnet50", "lraspp"], tiny=False)[:2]
    assert [(case.network, case.precision, case.channels_last, case.batch) for case in first] == [
        ("resnet50", "bf16-mixed", True, 256),
        ("lraspp", "bf16-mixed", True, 64),
    ]
    every = {(case.kind, case.precision, case.channels_last) for case in cases(["lraspp"], tiny=False)}
    assert len([case for case in every if case[0] == "step"]) == 6


def test_one_process_measures_while_the_others_wait(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.gpu import Card\n"
        "card = Card(Path(sys.argv[1])); card.shared(); card.alone()\n"
        "start = time.monotonic(); time.sleep(0.3); print(start, time.monotonic())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    (first_start, first_end), (second_start, second_end) = (
        map(float, process.communicate()[0].split()) for process in processes
    )
    assert first_end <= second_start or second_end <= first_start


def test_who_prepares_for_too_long_leaves_the_rest_out(tmp_path: Path) -> None:
    alone, patient, hurried = Card(None, 0), Card(tmp_path / "one", 60), Card(tmp_path / "other", 0)
    for card in (alone, patient, hurried):
        card.shared()
    assert [card.is_wanted() for card in (alone, patient, hurried)] == [False, False, True]
    arguments = argparse.Namespace(device="cpu", turn=1e-3, rounds=1, turns_seconds=1, variants=["ours learned"])
    rows: list[dict[str, Any]] = []
    measured(Case("step", "ffnet_nano", (32, 32), 2), arguments, False, hurried, lambda *row: rows.extend(row))
    assert rows[0]["errors"] == {"ours learned": "left out: the others were prepared by then"}
    assert not rows[0]["train_s"]
