"""How long a user waits before anything happens: importing the package, and the command line's help."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import interleaved, publish, table

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import lightning_quant": [sys.executable, "-c", "import lightning_quant"],
    "lightning-quant --help": [str(Path(sys.executable).with_name("lightning-quant")), "--help"],
}


def main() -> None:
    """Time fresh processes; that of Python itself is taken off the import."""
    seconds = interleaved(
        {
            name: functools.partial(subprocess.run, argv, check=True, capture_output=True)
            for name, argv in COMMANDS.items()
        }
    )
    rows = [
        ["`import lightning_quant`", f"{seconds['import lightning_quant'] - seconds['python -c pass']:.3f} s"],
        ["`lightning-quant --help`", f"{seconds['lightning-quant --help']:.2f} s"],
    ]
    publish("startup", table(["", "median of 7"], rows), seconds)


if __name__ == "__main__":
    main()
