"""Where the configuration files are. Imports next to nothing: the Hydra plugin runs at the start of every Hydra app."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """Return the folder of the configuration files: in the installed package, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
