"""Coverage-guided fuzzing of every reader: ``python -m tests.attacks.fuzz --seconds 60``.

Atheris (libFuzzer) keeps the inputs that reach new branches of the package and builds on them; documents and archives
are changed inside, so that they get past the parser and the checksums. It prints one JSON line at the end. An input
that something else than the package's own errors comes of is written to ``--crashes``; it belongs into the corpus.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 17


def main() -> None:
    """Fuzz in a process of its own, which libFuzzer ends without a word, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        fuzz(arguments.inside, arguments.crashes.absolute(), arguments.seconds, arguments.seed)
        return
    with tempfile.TemporaryDirectory(prefix="lightning-quant-fuzz-") as scratch:
        command = [sys.executable, "-m", "tests.attacks.fuzz", *sys.argv[1:], "--inside", scratch]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        counts_file = Path(scratch) / "counts.json"
        if done.returncode or not counts_file.is_file():
            sys.exit(done.stderr[-3000:])
        counts = json.loads(counts_file.read_text())
    found = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)/", done.stderr)
    branches, kept = map(int, found[-1])
    print(json.dumps({**counts, "inputs_kept": kept, "branches_reached": branches}))
    sys.exit(counts["escaped"] > 0)


def fuzz(scratch: Path, crashes: Path, seconds: int, seed: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    warnings.simplefilter("ignore")
    logging.disable()
    with atheris.instrument_imports(include=["lightning_quant"]):
        from tests.attacks import readers

    from tests.attacks.corpus import corpus

    genuine = scratch / "genuine"
    readers.make_genuine(genuine)
    names = list(readers.READERS)
    seeds = scratch / "seeds"
    seeds.mkdir()
    for index, name in enumerate(names):
        reader = readers.READERS[name]
        whole = (genuine / reader.file).read_bytes()
        kept = [whole, *(attack.data for attack in corpus(name, whole, slow=True) if not reader.slow)]
        for number, data in enumerate(one for one in kept if len(one) < _MOST_BYTES):
            (seeds / f"{index}-{number}").write_bytes(bytes([index]) + data)
    counts = {"executions": 0, "refused": 0, "accepted": 0, "escaped": 0}

    def one(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        work = scratch / "work" / name.replace(" ", "-")
        counts["executions"] += 1
        try:
            reader = readers.READERS[name]
            error = readers.outcome(reader, readers.attacked(genuine, work, reader, data[1:]))
            counts["accepted" if error is None else "refused"] += 1
        except Exception as escaped:
            counts["escaped"] += 1
            crashes.mkdir(parents=True, exist_ok=True)
            place = crashes / f"{name.replace(' ', '-')}-{type(escaped).__name__}-{counts['escaped']}"
            place.write_bytes(data[1:])
            place.with_suffix(".txt").write_text(f"{escaped!r:.2000}")
        if counts["executions"] % 50 == 0 or counts["escaped"]:
            partial = scratch / "counts.partial"
            partial.write_text(json.dumps(counts))
            partial.replace(scratch / "counts.json")

    def mutator(data: bytes, most: int, number: int) -> bytes:
        generator = random.Random(number)
        if not data or generator.random() < 0.2:
            return atheris.Mutate(data, most)[:most]
        return (data[:1] + mutated(data[1:], generator))[:most]

    os.chdir(scratch)
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={_MOST_BYTES}", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one, custom_mutator=mutator)
    atheris.Fuzz()


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A document with a value changed, an archive with a member changed, else some bytes changed."""
    try:
        return _changed_document(json.loads(data), generator)
    except (ValueError, RecursionError):
        pass
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = generator.choice(list(members))
        members[name] = _changed_bytes(members[name], generator)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for other, content in members.items():
                archive.writestr(other, content)
        return made.getvalue()
    except Exception:  # no archive, or a damaged one
        return _changed_bytes(data, generator)


def _changed_document(content: Any, generator: random.Random) -> bytes:
    from tests.attacks.json_attacks import VALUES, as_json, paths_in, replaced, without

    places = list(paths_in(content))
    for _ in range(generator.randint(1, 3)):
        place = generator.choice(places)
        try:
            if place and generator.random() < 0.2:
                content = without(content, place)
            else:
                content = replaced(content, place, generator.choice(list(VALUES.values())))
        except (KeyError, IndexError, TypeError, AttributeError):  # an earlier change took the place away
            continue
    return as_json(content)


def _changed_bytes(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if changed and generator.random() < 0.8:
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        elif changed:
            at = generator.randrange(len(changed))
            del changed[at : at + generator.randint(1, 8)]
    return bytes(changed)


if __name__ == "__main__":
    main()
