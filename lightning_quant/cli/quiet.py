"""What other packages print: once, without greetings and known noise."""

from __future__ import annotations

import logging
import warnings


def quiet_third_party() -> None:
    """Leave Lightning's messages to the log of the app, and silence known noise; after Lightning was imported."""
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).handlers.clear()
    for name in ("lightning.pytorch.utilities.rank_zero", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    for message in ("does not have many workers", "Experiment logs directory .* exists and is not empty"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
