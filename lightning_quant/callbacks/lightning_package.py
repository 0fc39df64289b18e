"""Lightning comes under two names, which do not work together."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_quant.errors import ConfigurationError


def check_trainer_package(trainer: Any, user: str) -> None:
    """Refuse a Trainer of the package ``pytorch_lightning``: the same code, but other classes.

    Args:
        trainer: the Trainer that a callback was given to.
        user: name of the callback, for the message.

    Raises:
        ConfigurationError: which says what to import.
    """
    if not isinstance(trainer, pl.Trainer):
        raise ConfigurationError(_message(f"{user} in a Trainer", type(trainer)))


def check_module_package(module_class: type, user: str) -> None:
    """Refuse a module of the package ``pytorch_lightning``, see :func:`check_trainer_package`."""
    if not issubclass(module_class, pl.LightningModule):
        raise ConfigurationError(_message(f"{user} of {module_class.__name__}, a class", module_class))


def _message(what: str, kind: type) -> str:
    package = next((name for one in kind.__mro__ if (name := _package(one)) == "pytorch_lightning"), _package(kind))
    return (
        f"{what} of the package {package!r}: expected one of 'lightning.pytorch', which is the same code under its "
        "present name. Write `import lightning.pytorch as pl` for `import pytorch_lightning as pl`, for the Trainer, "
        "the LightningModule and all callbacks alike."
    )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
