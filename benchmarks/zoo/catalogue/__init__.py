"""The networks of the zoo: none of them was written here, all are small and have random weights."""

from __future__ import annotations

import fnmatch

from benchmarks.zoo.catalogue import (
    audio_networks,
    segmentation_networks,
    timm_networks,
    torchvision_networks,
    transformers_networks,
    ultralytics_networks,
)
from benchmarks.zoo.catalogue.entry import Entry

_SOURCES = (
    torchvision_networks,
    timm_networks,
    segmentation_networks,
    transformers_networks,
    ultralytics_networks,
    audio_networks,
)


def catalogue() -> dict[str, Entry]:
    """Every network by name, in a fixed order."""
    return {entry.name: entry for source in _SOURCES for entry in source.entries()}


def chosen(glob: str) -> list[Entry]:
    """The networks whose name matches a glob, such as ``timm/*vit*``.

    Raises:
        ValueError: when there is none.
    """
    found = [entry for name, entry in catalogue().items() if fnmatch.fnmatchcase(name, glob)]
    if not found:
        raise ValueError(f"--only {glob!r} matches no network; the names are: {', '.join(catalogue())}")
    return found
