"""Classes by name: what a user writes for a rung, a range estimator or a target, made into the object that is meant."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from lightning_quant.errors import ConfigurationError

T = TypeVar("T")

Spec = str | Mapping[str, Mapping[str, Any]]
"""A name or the dotted path of a class, or ``{name: {option: value}}``."""


class Registry(Generic[T]):
    """Classes that derive from one base class, by the ``name`` that each has.

    Args:
        noun: what they are, in messages, e.g. ``"range estimator"``.
        base: the base class, which is public as ``lightning_quant.<its name>``.
        homes: the classes of this package by name, as dotted paths: each is imported when it is asked for.
        keywords: words that are given instead of a name and mean something else; no class may be called so.
        reserved: other words that no class may be called.
    """

    def __init__(
        self,
        noun: str,
        base: type[T],
        homes: Mapping[str, str],
        keywords: Sequence[str] = (),
        reserved: Sequence[str] = (),
    ) -> None:
        self.noun = noun
        self._start = noun.capitalize()  # of a sentence
        self.base = base
        self.homes = dict(homes)
        self.keywords = tuple(keywords)
        self.reserved = {*keywords, *reserved}
        self._registered: dict[str, type[T]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this package's classes, then of the others that were imported."""
        return (*self.homes, *self._registered)

    def register(self, kind: type[T]) -> None:
        """Make a class known by its name; one without a name of its own is a base of others.

        Raises:
            ConfigurationError: for a name that is taken, or that is not a word.
        """
        name = vars(kind).get("name")
        if name is None or self.homes.get(name) == _path(kind):
            return
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigurationError(
                f"{kind.__qualname__}.name is {name!r}: expected a word of letters, digits and underscores."
            )
        known = self._registered.get(name)
        # by another file or the same one again: as a script and imported, or a cell of a notebook
        redefined = known is not None and known.__qualname__ == kind.__qualname__
        taken = self.homes.get(name) or (known and _path(known)) or (name in self.reserved and "a keyword")
        if taken and not redefined:
            raise ConfigurationError(
                f"{kind.__qualname__} is named {name!r}, as {taken} is: expected a name of its own."
            )
        self._registered[name] = kind

    def make(
        self,
        given: T | Spec,
        offered: Callable[[type[T]], Mapping[str, Any]] = lambda kind: {},
        paths: bool = True,
    ) -> T:
        """Return the object that is meant.

        Args:
            given: one, which is returned as it is; a name or a dotted path; or one of those with options.
            offered: returns arguments for the constructor of a class, which gets those that it names and that are not
                among the options given.
            paths: whether dotted paths are imported. What a file names must not be.

        Raises:
            ConfigurationError: for an unknown name, a path that cannot be imported, or options that it does not take.
        """
        if isinstance(given, self.base):
            self._check_name(type(given), type(given).__qualname__)
            return given
        name, options = self._name_and_options(given)
        kind = self.find(name, paths)
        named = inspect.signature(kind).parameters
        arguments = {key: value for key, value in offered(kind).items() if key in named}
        try:
            return kind(**{**arguments, **options})
        except TypeError as error:
            takes = f" It takes {', '.join(named)}." if named else " It takes none."
            raise ConfigurationError(f"{self._start} {name!r} with options {options!r}: {error}.{takes}") from error

    def find(self, name: str, paths: bool = True) -> type[T]:
        """Return the class of a name or, if ``paths``, of a dotted path.

        Raises:
            ConfigurationError: for an unknown name, or a path that cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self.homes:
            return self._imported(name, self.homes[name])
        if paths and "." in name:
            return self._imported(name, name)
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"Unknown {self.noun} {name!r}: expected one of {', '.join((*self.keywords, *self.names))}, or the dotted "
            f"path of a class of your own.{hint}"
        )

    def reference(self, kind: type[T]) -> str:
        """Return the name of a class of this package and the dotted path of any other: it is found in every process."""
        path = _path(kind)
        return next((name for name, home in self.homes.items() if home == path), path)

    def _imported(self, name: str, path: str) -> type[T]:
        try:
            kind = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"{self._start} {name!r} cannot be imported: {error}.") from error
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise ConfigurationError(
                f"{self._start} {name!r} is not a subclass of lightning_quant.{self.base.__name__}."
            )
        self._check_name(kind, name)
        return kind

    def _check_name(self, kind: type, given: str) -> None:
        if not isinstance(getattr(kind, "name", None), str):
            raise ConfigurationError(f"{self._start} {given!r} has no name: expected a class attribute name = '…'.")

    def _name_and_options(self, given: Any) -> tuple[str, dict[str, Any]]:
        if isinstance(given, str):
            return given, {}
        if isinstance(given, Mapping) and len(given) == 1:
            ((name, options),) = given.items()
            if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
                return name, dict(options or {})
        raise ConfigurationError(
            f"{self._start} {given!r}: expected a name, the dotted path of a class, one of them with its options, "
            f"{{{self.names[0]!r}: {{…}}}}, or a lightning_quant.{self.base.__name__}."
        )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
