"""Pictures of the reports for README: ``python -m benchmarks.screenshots multirun/demo``, see ``make screenshots``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
# Width, height, color scheme, and where the page is scrolled to.
SHOTS = {
    "report-desktop": (1100, 900, "light", "report", None),
    "report-pictures": (1100, 900, "light", "report", "#pictures"),
    "report-layers": (1100, 1250, "dark", "report", "#layers"),
    "report-phone": (390, 800, "dark", "report", None),
    "sweep-desktop": (1100, 950, "light", "sweep", None),
}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    """Open the report of a sweep and that of its last run in headless Chromium, and write PNG files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a finished sweep")
    sweep = parser.parse_args().sweep.resolve()
    run = sorted(sweep.glob("*/report.html"))[-1]
    pages = {"sweep": sweep / "report.html", "report": run}
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        for name, (width, height, scheme, which, anchor) in SHOTS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(f"{pages[which].as_uri()}{anchor or ''}")
            page.wait_for_timeout(1500)  # until Bokeh has drawn
            path = IMAGES / f"{name}.png"
            page.screenshot(path=path)
            with Image.open(path) as picture:  # 256 colors: a third of the bytes
                picture.convert("RGB").quantize(256).save(path, optimize=True)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
