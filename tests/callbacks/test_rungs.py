"""Each rung in turn is the one that suffices, and the ladder stops there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.callbacks.rung_cases import CASES, fit_case


@pytest.mark.parametrize("name", CASES)
def test_the_ladder_stops_at_the_rung_that_suffices(name: str, tmp_path: Path) -> None:
    callback, trainer = fit_case(CASES[name], tmp_path)
    result = callback.result
    asked = [next(iter(rung)) if isinstance(rung, dict) else rung for rung in CASES[name].rungs]
    before = asked[: asked.index(name)] if name in asked else asked
    assert [rung.rung for rung in result.rungs] == [*before, name]
    assert result.satisfied
    assert all(rung.drop is None or rung.drop > CASES[name].max_drop for rung in result.rungs[:-1])
    assert (trainer.global_step > 0) == (name == "qat")
    (metrics,) = trainer.validate(trainer.lightning_module, trainer.val_dataloaders, verbose=False)
    assert metrics["val_db"] == pytest.approx(result.rungs[-1].metric, abs=1e-4)
