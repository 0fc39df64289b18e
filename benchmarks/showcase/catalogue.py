"""The domains of the showcase, by name."""

from __future__ import annotations

from benchmarks.showcase.domain import Domain
from benchmarks.showcase.domains import classification, keypoints, pitch, sentences

DOMAINS: dict[str, Domain] = {
    module.DOMAIN.name: module.DOMAIN for module in (classification, keypoints, pitch, sentences)
}
