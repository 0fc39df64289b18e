"""Progress of what takes time besides training, in the style of the Trainer's own bar: Rich, tqdm, or none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_quant.callbacks.lightning_packages import either

Advance = Callable[[int], None]


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int | None = None) -> Iterator[Advance]:
    """Show a bar for the length of a block; nothing where the Trainer shows none, or the output is not a terminal.

    Examples:
        >>> with progress(trainer, "Calibrating", total=256) as advance:  # doctest: +SKIP
        ...     for batch in batches:
        ...         advance(len(batch))

    Args:
        trainer: the Trainer whose style of bar is used.
        description: what is being done.
        total: how much there is to do, for the time left. ``None``: unknown, the time that has passed is shown.
    """
    bar: Any = trainer.progress_bar_callback
    shown = bar is not None and bar.is_enabled and trainer.is_global_zero and sys.stdout.isatty()
    if shown and isinstance(bar, either(RichProgressBar)):
        yield from _rich(description, total)
    elif shown and isinstance(bar, either(TQDMProgressBar)):
        yield from _tqdm(description, total)
    else:
        yield _nothing


def _nothing(count: int) -> None:
    """There is no bar to advance."""


def _rich(description: str, total: int | None) -> Iterator[Advance]:
    from rich import progress as rich

    columns = [rich.SpinnerColumn(), rich.TextColumn("{task.description}")]
    if total is not None:
        columns += [rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()]
    columns.append(rich.TimeElapsedColumn())
    with rich.Progress(*columns, transient=True) as shown:
        task = shown.add_task(description, total=total)
        yield lambda count: shown.advance(task, count)


def _tqdm(description: str, total: int | None) -> Iterator[Advance]:
    from tqdm.auto import tqdm

    form = None if total is not None else "{desc}: {elapsed}"
    with tqdm(
        total=total, desc=description, file=sys.stdout, leave=False, dynamic_ncols=True, bar_format=form
    ) as shown:
        if total is not None:
            yield lambda count: shown.update(count) and None
            return
        # never advanced, so it has to refresh its clock itself
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(1):
                shown.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield _nothing
        finally:
            ended.set()
            clock.join()
