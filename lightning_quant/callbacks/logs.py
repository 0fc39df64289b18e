"""What callbacks log about a run."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities.rank_zero import rank_zero_only

# Below Lightning's own logger, so that what a run logs appears where Lightning's messages do.
log = logging.getLogger(f"lightning.pytorch.{__name__}")


@rank_zero_only
def rank_zero_log(message: str) -> None:
    """Log what a callback did, once whatever the number of processes."""
    log.info(message)
