"""What a target was asked for, kept next to the bundle so that it can be resumed."""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_quant.deploy.manifest import BundleFile
from lightning_quant.deploy.targets.aihub.target import AiHubTarget
from lightning_quant.deploy.targets.target import LONGEST, TARGETS
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, parse_as, read_json


@dataclass(frozen=True)
class Request:
    """A bundle sent to a target.

    Args:
        target: name of the target, or ``"auto"``.
        devices: names of the devices.
        timeout: seconds for everything.
        options: further arguments of :class:`~lightning_quant.deploy.targets.aihub.target.AiHubTarget`; ``None`` for
            a target that no file can hold: of the user's own, or with options of its own.
        bundle: the files that were sent.
    """

    target: str
    devices: list[str]
    timeout: float
    options: dict[str, Any] | None
    bundle: dict[str, BundleFile]

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read what :meth:`write` wrote.

        Raises:
            OSError, ValueError: when it is missing or damaged.
        """
        request: Request = parse_as(read_json(path), cls)
        known = ("auto", *TARGETS.homes)
        resumable = request.options is None or request.target in known
        check(resumable, "target", request.target, f"one of {', '.join(known)}")
        check(0 < request.timeout <= LONGEST, "timeout", request.timeout, f"0 to {LONGEST:.0f} seconds")
        arguments = typing.get_type_hints(AiHubTarget.__init__)
        for name, value in (request.options or {}).items():
            allowed = name in arguments and name not in ("devices", "timeout")
            check(allowed, f"options.{name}", value, "an option of AiHubTarget")
            parse_as(value, arguments[name], f"options.{name}")
        return request
