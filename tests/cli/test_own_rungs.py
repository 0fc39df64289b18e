"""A rung in a file beside the command that names it; what the report prints runs again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_quant.report.record import RunRecord
from tests.helpers.app import QUICK, SMALL, lightning_quant

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).resolve().parents[2] / "docs/ladder.md"


def test_the_rung_of_the_guide_is_tried_from_the_command_line_and_again_by_what_the_report_prints(
    tmp_path: Path,
) -> None:
    written = re.search(r"```python\n(# my_rungs\.py\n.*?)```", GUIDE.read_text(), re.DOTALL)
    assert written is not None
    (tmp_path / "my_rungs.py").write_text(written[1])
    given = ["qat.epochs=0", "target=none", "overlays=0", "report.samples=0"]
    rungs = "ladder.rungs=[ptq,{my_rungs.WiderWeights:{factor:1.1}}]"
    small = [one for one in SMALL if not one.startswith(("ladder.rungs", "target.", "qat.", "overlays"))]
    lightning_quant(tmp_path, *small, *given, rungs, "hydra.run.dir=first")
    first = RunRecord.read(tmp_path / "first/results.json")
    command, *arguments = shlex.split(first.reproduce)
    assert command == "lightning-quant"
    lightning_quant(tmp_path, *arguments, "hydra.run.dir=second")
    second = RunRecord.read(tmp_path / "second/results.json")
    assert second.config_hash == first.config_hash
    assert second.metric == first.metric
    assert first.metric.keys() == {"float", "ptq", "wider_weights"}


INTERRUPTED = """
from lightning_quant import Rung


class Interrupted(Rung):
    name = "interrupted"

    def apply(self, network, context):
        raise KeyboardInterrupt  # as Ctrl-C does
"""


def test_after_ctrl_c_the_command_that_resumes_is_shown(tmp_path: Path) -> None:
    (tmp_path / "my_rungs.py").write_text(INTERRUPTED)
    arguments = [*QUICK, "ladder.rungs=[ptq,my_rungs.Interrupted]", "hydra.run.dir=out"]
    output = lightning_quant(tmp_path, *arguments, status=130)
    assert re.search(r"Stopped by SIGINT\. With hydra\.run\.dir=\S*out skip_finished=true the same command", output)
    assert RunRecord.read(tmp_path / "out/results.json").status == "running"
