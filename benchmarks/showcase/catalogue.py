"""The domains of the showcase, by name."""

from __future__ import annotations

from benchmarks.showcase.domain import Domain
from benchmarks.showcase.domains import (
    classification,
    detection,
    keypoints,
    pitch,
    scenes,
    sentences,
    text_detection,
    text_recognition,
)

DOMAINS: dict[str, Domain] = {
    module.DOMAIN.name: module.DOMAIN
    for module in (
        classification,
        scenes,
        detection,
        keypoints,
        pitch,
        sentences,
        text_recognition,
        text_detection,
    )
}
