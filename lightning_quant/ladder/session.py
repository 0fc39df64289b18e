"""The state of a fit on its ladder: what was measured, which correction is applied, and whether training continues."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import CheckpointError
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Rung

TRAINING = "qat"
"""The name under which training is recorded, after the rungs."""


@dataclass
class LadderSession:
    """What a fit knows of its ladder besides the network, and what has to be restored to resume it.

    Args:
        ladder: what was measured.
        climbed: whether the rungs are over.
        correction: while climbing, the name of the correction on top of the best network, if there is one.
        base: that network without the correction, for the next rung to start from.
        trained_metric: the best metric of a validation in training, ``None`` before the first.
        improving: whether the last validation in training was better than those before it.
        best_model_path: the checkpoint of the best network so far.
    """

    ladder: Ladder
    climbed: bool = False
    correction: str | None = None
    base: dict[str, Any] | None = None
    trained_metric: float | None = None
    improving: bool = True
    best_model_path: str = ""

    def untried(self, rungs: Iterable[Rung]) -> list[str]:
        """Return the names of the rungs that have no result, sorted."""
        return sorted({rung.name for rung in rungs} - {result.rung for result in self.ladder.rungs})

    def finish_climb(self) -> None:
        """End the climb: there is no next rung that needs the network without its correction."""
        self.climbed = True
        self.correction = self.base = None

    @property
    def needs_training(self) -> bool:
        """Whether no rung was good enough, or training has begun already."""
        return not self.ladder.satisfied or self.trained_metric is not None

    @property
    def should_stop(self) -> bool:
        """Whether training has come within the bound, and its last validation was not better than those before."""
        return not self.improving and self.trained_metric is not None and self.ladder.suffices(self.trained_metric)

    def judge_validation(self, metric: float) -> bool:
        """Take in the metric of a validation in training; return whether the network is the best so far."""
        rungs = [rung.metric for rung in self.ladder.rungs if rung.kept and rung.rung != TRAINING]
        known = [value for value in (self.trained_metric, *rungs) if value is not None]
        best = self.ladder.comparison.best(known) if known else None
        self.improving = self.ladder.is_better(metric, self.trained_metric)
        if self.improving:
            self.trained_metric = metric
        return self.ladder.is_better(metric, best)

    def judge_training(self, steps: int, seconds: float, peak_memory_bytes: int | None) -> RungResult:
        """Record training as the last rung, in the place of what a fit that was resumed recorded of it."""
        self.ladder.rungs = [rung for rung in self.ladder.rungs if rung.rung != TRAINING]
        metric = math.nan if self.trained_metric is None else self.trained_metric
        return self.ladder.judge(TRAINING, metric, f"trained for {steps} steps", seconds, peak_memory_bytes)

    def describe(self) -> str:
        """Say in one line which rung is the best, and how it compares with float."""
        ladder, best = self.ladder, self.ladder.best
        if best is None or best.metric is None:
            return "no rung gave a usable network"
        drop = ladder.drop(best.metric)
        size = f"{abs(drop):.4f}" if abs(drop) >= 5e-5 else f"{abs(drop):.1g}"  # not "0.0000 worse than"
        compared = f"{size} {'worse' if drop > 0 else 'better'} than" if drop else "equal to"
        reestimated = " with re-estimated batch norms" if ladder.reference != ladder.float_metric else ""
        bound = "" if ladder.max_drop is None else f" (max_drop={ladder.max_drop:g})"
        return (
            f"{ladder.monitor} {best.metric:.4f} by {best.rung}, {compared} float {ladder.reference:.4f}"
            f"{reestimated}{bound}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume, as plain values and tensors."""
        state = {
            "ladder": self.ladder.to_dict(),
            "climbed": self.climbed,
            "finishing": self.correction,
            "trained_metric": self.trained_metric,
            "improving": self.improving,
            "best_model_path": self.best_model_path,
        }
        return state if self.climbed else {**state, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The bound stays the one given now.

        Raises:
            CheckpointError: if it was measured by another metric.
        """
        known = Ladder.from_dict(state["ladder"])
        if (known.monitor, known.mode) != (self.ladder.monitor, self.ladder.mode):
            raise CheckpointError(
                f"The checkpoint was measured by monitor={known.monitor!r}, mode={known.mode!r}, but the callback was "
                f"given monitor={self.ladder.monitor!r}, mode={self.ladder.mode!r}. Give the same, or start from the "
                "float weights."
            )
        known.max_drop = self.ladder.max_drop
        self.ladder = known
        self.climbed = state["climbed"]
        self.correction = state["finishing"]
        self.base = state.get("base")
        self.trained_metric = state["trained_metric"]
        self.improving = state.get("improving", True)
        self.best_model_path = state["best_model_path"]
