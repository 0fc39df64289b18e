"""Hooks into the setup of a strategy, where Lightning has none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy


def hook_strategy(
    strategy: Strategy,
    while_optimizers_are_made: Callable[[], AbstractContextManager[object]],
    optimizers_are_made: Callable[[], None],
    all_is_set_up: Callable[[], None],
) -> Callable[[], None]:
    """Hook the next ``strategy.setup()``, which moves the module to its device, wraps it and makes the optimizers.

    Args:
        strategy: the Trainer's.
        while_optimizers_are_made: returns the context to call the user's ``configure_optimizers`` in.
        optimizers_are_made: called next, before Lightning uses the optimizers.
        all_is_set_up: called at the end, before any callback's ``on_fit_start``.

    Returns:
        What removes the hooks. They remove themselves once all is set up.
    """
    make_optimizers, set_up = strategy.setup_optimizers, strategy.setup

    def setup_optimizers(trainer: pl.Trainer) -> None:
        with while_optimizers_are_made():
            make_optimizers(trainer)
        optimizers_are_made()

    def setup(trainer: pl.Trainer) -> None:
        try:
            set_up(trainer)
        finally:
            unhook()
        all_is_set_up()

    def unhook() -> None:  # removes the object's own attributes, which uncovers those of its class
        for name in ("setup_optimizers", "setup"):
            vars(strategy).pop(name, None)

    strategy.setup_optimizers = setup_optimizers  # type: ignore[method-assign]
    strategy.setup = setup  # type: ignore[method-assign]
    return unhook
