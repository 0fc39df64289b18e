"""Lightning's two packages: ``lightning.pytorch`` and ``pytorch_lightning`` are the same code, but other classes.

A user's Trainer, module and callbacks may be of either. The callbacks here derive from the base classes of both, ask
with :func:`either` what an object is, and call functions of the object's own package, see :func:`of_package`.
Annotations name ``lightning.pytorch`` alone.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import model_helpers
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from typing_extensions import override

from lightning_quant.errors import ConfigurationError

T = TypeVar("T")

# The package that is annotated and imported everywhere, and its counterpart.
_PACKAGES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
OTHER = "pytorch_lightning"


def either(*kinds: type[T]) -> tuple[type[T], ...]:
    """Return classes of ``lightning.pytorch`` and their counterparts in ``pytorch_lightning``, for ``isinstance``.

    Examples:
        >>> isinstance(module, either(pl.LightningModule))  # doctest: +SKIP
    """
    things: tuple[Any, ...] = kinds
    return tuple(found for kind in things for found in (kind, _counterpart(kind)) if found is not None)


def of_package(owner: object, thing: T) -> T:
    """Return a class or function of ``lightning.pytorch`` in the package that an object is of.

    Args:
        owner: a Trainer, a LightningModule or another object of Lightning's.
        thing: the class or function, as ``lightning.pytorch`` has it.

    Returns:
        Its counterpart if the object is of ``pytorch_lightning``, else the thing itself.
    """
    found = _counterpart(thing) if package_of(type(owner)) == OTHER else None
    return thing if found is None else found


def is_overridden(hook: str, owner: object) -> bool:
    """Whether a LightningModule or LightningDataModule of either package overrides a hook."""
    return of_package(owner, model_helpers.is_overridden)(hook, owner)


def package_of(kind: type) -> str:
    """Return which of Lightning's packages a class derives from; its own package if it derives from neither."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((name for name in packages if name in ("lightning", OTHER)), packages[0])


def check_module_class(module_class: type, user: str) -> None:
    """Refuse what is not a class of LightningModules of either package.

    Raises:
        ConfigurationError: which names both packages.
    """
    if not isinstance(module_class, type):
        kind = type(module_class).__name__
        raise ConfigurationError(f"{user} of an object, a {kind}: expected the LightningModule's class itself.")
    if not issubclass(module_class, either(pl.LightningModule)):
        raise ConfigurationError(
            f"{user} of {module_class.__name__}, a class of the package {package_of(module_class)!r}: expected a "
            "LightningModule of 'lightning.pytorch' or 'pytorch_lightning'."
        )


def _refuse_mixed_packages(trainer: pl.Trainer) -> None:
    """Explain why a data module of the other package fails, which Lightning does with ``Expected a parent``."""
    datamodule = getattr(trainer, "datamodule", None)
    mine, theirs = package_of(type(trainer)), package_of(type(datamodule))
    if isinstance(datamodule, either(pl.LightningDataModule)) and mine != theirs:
        raise ConfigurationError(
            f"{type(datamodule).__name__} is a LightningDataModule of {_dotted(theirs)}, in a Trainer of "
            f"{_dotted(mine)}: expected both of one package. Import Trainer, LightningModule and LightningDataModule "
            "from the same one; callbacks and loggers may be of either."
        )


def _dotted(package: str) -> str:
    return "'lightning.pytorch'" if package == "lightning" else f"{package!r}"


@cache
def _counterpart(thing: Any) -> Any:
    """The class or function at the same place in the other package; ``None`` where there is none."""
    for package, other in _PACKAGES.items():
        if thing.__module__.startswith(f"{package}."):
            module = _imported(other + thing.__module__.removeprefix(package))
            return getattr(module, thing.__qualname__, None)
    return None


@cache
def _imported(name: str) -> Any:
    """Import a module of the other package, without what that does to warnings and to what Lightning logs."""
    log = rank_zero_module.log  # one for both packages
    try:
        with warnings.catch_warnings():
            return importlib.import_module(name)
    except Exception:  # not installed, or too old for what is: then no object is of it
        return None
    finally:
        rank_zero_module.log = log


if TYPE_CHECKING:
    _EitherCallback = Callback
    _EitherCheckpoint = Checkpoint
else:
    _EitherCallback = type("_EitherCallback", either(Callback), {})
    _EitherCheckpoint = type("_EitherCheckpoint", either(Checkpoint), {})


class AnyCallback(_EitherCallback):
    """Base of our callbacks: Trainers and LightningCLIs of either package take it for one of their own."""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _refuse_mixed_packages(trainer)


class AnyCheckpoint(AnyCallback, _EitherCheckpoint):
    """As :class:`AnyCallback`, for callbacks that Trainers call last and count as checkpoints."""
