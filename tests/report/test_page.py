"""Reports in real headless Chromium: they open from disk, answer to mouse and keyboard, and fetch nothing."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.result import BLAME_NAME, write_blames
from lightning_quant.domains.segmentation.ffnet import ffnet_40s
from lightning_quant.errors import DataError
from lightning_quant.report.page import write_report, write_sweep_report
from lightning_quant.report.summary import gather
from tests.helpers.networks import Body, calibrated, images
from tests.report.folders import full_record, record, run_folder

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
# Without these it looks for updates; as root it needs no sandbox.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
PHONE, DESKTOP = {"width": 390, "height": 800}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run_folder(tmp_path_factory.mktemp("run"), Body(), images(1)))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    small = {"device": [], "bytes": {"float": 100_000, "quantized": 30_000}}
    full_record(precision="w8a8", **small).write(folder / "0-a b")
    full_record().write(folder / "1-w4a16")
    for run, precision in (("0-a b", "w8a8"), ("1-w4a16", "w4a16")):
        found = blame(calibrated(Body(), precision=precision), images(2), against="float")
        write_blames(folder / run / BLAME_NAME, [found])
    record(precision="w8a16", status="failed", error="ParityError: 12 dB").write(folder / "2-w8a16")
    write_report(folder / "0-a b")
    return write_sweep_report(folder, gather(folder))


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """A page that has drawn its charts, and what went wrong or was fetched meanwhile."""
    page = browser.new_page(**options)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda asked: problems.append(asked.url) if not asked.url.startswith(("data:", "file:")) else None
    )
    page.goto(path.as_uri())
    until(page, "Bokeh.documents.length > 0 && Bokeh.documents.every((one) => one.is_idle)")
    return page, problems


def until(page: Any, condition: str) -> None:
    """Wait for it; the browser's own way needs ``eval``, which the page forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("which", ["report", "sweep"])
def test_it_opens_without_errors_and_fits(
    browser: Any, request: pytest.FixtureRequest, which: str, viewport: Any, scheme: str
) -> None:
    page, problems = opened(browser, request.getfixturevalue(which), viewport=viewport, color_scheme=scheme)
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    # nor does a table: what is scrolled sideways is not seen
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    tables = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth)"
    assert page.evaluate(f"{tables}.map((one) => one.getAttribute('aria-label'))") == []
    assert page.evaluate("[...document.images].every((one) => one.naturalWidth > 0)")
    assert page.locator(".chart canvas").count() >= (5 if which == "report" else 2)
    # text stands out from what is behind it by 4.5 to 1 (WCAG 2.1, 1.4.3), in the charts as well
    colors = page.evaluate(
        """() => {
            const back = getComputedStyle(document.body).backgroundColor;
            const texts = [...document.querySelectorAll("p, dt, dd, th, td, a, summary, h1, h2")];
            const axes = Bokeh.documents.flatMap((one) => [...one.all_models]).filter((one) => /Axis$/.test(one.type));
            const probe = document.body.appendChild(document.createElement("i"));
            const computed = (color) => ((probe.style.color = color), getComputedStyle(probe).color);
            return [back, texts.map((one) => getComputedStyle(one).color),
                axes.flatMap((one) => [one.axis_label_text_color, one.major_label_text_color].map(computed))];
        }"""
    )
    back, texts, axes = colors
    assert axes
    assert min(contrast(color, back) for color in {*texts, *axes}) >= 4.5
    page.close()


def contrast(one: str, other: str) -> float:
    """Of two colors as CSS gives them, after WCAG 2.1."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@needs_browser
@pytest.mark.parametrize(
    ("which", "bands"),
    [
        ("report", [["float", "loses"], ["float", "arrived"], ["exported file", "adds"], ["exported file", "arrived"]]),
        ("sweep", [["w8a8", "loses"], ["w8a8", "arrived"], ["w4a16", "loses"], ["w4a16", "arrived"]]),
    ],
)
def test_the_network_is_drawn_as_bands_of_layers(
    browser: Any, request: pytest.FixtureRequest, which: str, bands: list[list[str]]
) -> None:
    page, problems = opened(browser, request.getfixturevalue(which), viewport=DESKTOP)
    sources = "Bokeh.documents.flatMap((one) => [...one.all_models]).filter((one) => one.type === 'ColumnDataSource')"
    drawn = page.evaluate(f"{sources}.map((one) => one.data).find((one) => one.arrived)")
    rows = [list(row) for row in dict.fromkeys(map(tuple, drawn["row"]))]
    assert rows == bands
    of_float = [alpha for row, alpha in zip(drawn["row"], drawn["alpha"], strict=True) if row == bands[-2]]
    assert (max(of_float) > 0.5) is (which == "sweep")  # 4-bit weights, and a file that is right
    if which == "report":
        page.get_by_text("All 5 layers").first.click()
        assert "head" in page.get_by_role("region", name="All layers, simulation and float").inner_text()
    assert problems == []
    page.close()


@needs_browser
def test_the_slider_moves_the_divider_by_keyboard(browser: Any, report: Path) -> None:
    page, problems = opened(browser, report, viewport=DESKTOP)
    slider = page.locator("input[type=range]").first
    over = page.locator(".over").first
    slider.focus()
    assert "50%" in over.evaluate("(one) => getComputedStyle(one).clipPath")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "60"
    assert "40%" in over.evaluate("(one) => getComputedStyle(one).clipPath")
    page.keyboard.press("Home")
    # nothing of the float picture is left: what is seen is the quantized one
    assert "100%" in over.evaluate("(one) => getComputedStyle(one).clipPath")
    assert problems == []
    page.close()


@needs_browser
def test_the_picker_draws_another_tensor(browser: Any, report: Path) -> None:
    page, problems = opened(browser, report, viewport=DESKTOP)
    drawn = "Bokeh.documents.map((one) => one.get_model_by_name('histogram')).find(Boolean).data.share"
    ends = """Bokeh.documents.flatMap((one) => [...one.all_models])
        .filter((one) => one.tags?.includes('end of the grid')).map((one) => one.location)"""
    first, text = page.evaluate(drawn), page.locator("#tensor-text").inner_text()
    assert "bits: 4" in text
    assert page.evaluate(ends) == [-8.5, 7.5]
    picker = page.locator("#tensor")
    picker.focus()
    index = picker.locator("option").all_inner_texts().index("head · output")
    for _ in range(index):
        page.keyboard.press("ArrowDown")
    assert picker.input_value() == str(index)
    assert "bits: 16" in page.locator("#tensor-text").inner_text()
    second = page.evaluate(drawn)
    assert second != first
    assert sum(second) == pytest.approx(100, abs=0.1)
    assert page.evaluate(ends) == [-0.5, 65535.5]
    assert problems == []
    page.close()


@needs_browser
def test_encodings_are_searched_by_words(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, viewport=DESKTOP)
    rows = page.locator("#encodings tbody tr")
    total = rows.count()
    page.get_by_label("Search").fill("head weight")
    assert page.locator("#found").inner_text() == f"1 of {total}"
    assert next(row for row in rows.all() if row.is_visible()).inner_text().split()[:3] == ["head", "weight", "4"]
    page.get_by_label("Search").fill("no such layer")
    assert page.locator("#found").inner_text() == f"0 of {total}"
    page.close()


@needs_browser
def test_everything_is_reached_by_the_tab_key(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, viewport=DESKTOP)
    wanted = {"INPUT#search", "SELECT#tensor", "SUMMARY", "A", "PRE", "DIV"}
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.tagName + (document.activeElement.id ? '#' + document.activeElement.id : '')"
            )
        )
    assert wanted <= reached
    assert page.evaluate("document.querySelectorAll('input[type=range]').length") == 4
    page.close()


@needs_browser
def test_the_charts_follow_when_the_scheme_changes(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, viewport=DESKTOP, color_scheme="light")
    color = """Bokeh.documents.flatMap((one) => [...one.all_models])
        .find((one) => /Axis$/.test(one.type)).major_label_text_color"""
    light = page.evaluate(color)
    page.emulate_media(color_scheme="dark")
    until(page, f"{color} !== '{light}'")
    page.close()


@needs_browser
def test_a_sweep_leads_to_the_reports_of_its_runs(browser: Any, sweep: Path) -> None:
    page, _ = opened(browser, sweep, viewport=DESKTOP)
    assert "1 of 3 runs did not finish" in page.locator(".verdict").inner_text()
    links = page.locator("table a")
    assert links.all_inner_texts() == ["w8a8"]  # the others have none
    links.first.click()
    page.wait_for_load_state()
    assert page.locator("h1").inner_text() == "ffnet_40s in W8A8"
    page.close()


def test_what_a_run_found_stands_in_its_report(report: Path) -> None:
    text = report.read_text()
    for expected in (
        "W4A16 needs QAT: 4.0 points lost by PTQ, 0.4 points lost after QAT; 7.4x smaller; 3.8x faster on Samsung",
        "measured on a real device by Qualcomm AI Hub",
        "resize: not said by AI Hub",
        "trained for 300 steps",
        "31.2",
        "lightning-quant precision=w4a16 &#39;ladder.rungs=[ptq,cle]&#39;",
        "seed: 3",
        "2.14.1",
        "image &lt;1&gt;",
        "1 × 6 × 10 × 3",
        "NHWC RGB",
        "scores, along axis 1",
        "mean 0 0 0, std 1 1 1",
        '<span style="background:#0000ff"></span>2 blue',
        "InferenceSession(&#39;net.app.onnx&#39;, options)",
    ):
        assert expected in text, expected
    assert "<b>not bold</b>" not in text  # names are text, whatever is in them
    assert "default-src 'none'" in text  # and so the browser fetches nothing


@pytest.mark.torture
def test_a_large_network_stays_below_five_megabytes(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path, ffnet_40s(), torch.randn(1, 3, 64, 128), (1024, 2048)))
    assert path.stat().st_size < 5_000_000
    assert path.read_text().count("<option") > 100  # all its tensors are there


def test_the_same_run_makes_the_same_file(report: Path, sweep: Path) -> None:
    before = report.read_bytes(), sweep.read_bytes()
    write_report(report.parent)
    write_sweep_report(sweep.parent, gather(sweep.parent))
    assert (report.read_bytes(), sweep.read_bytes()) == before


def test_a_run_that_failed_early_still_says_why(tmp_path: Path) -> None:
    record(status="failed", error="DataError: <no images>").write(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "W8A8 failed: DataError: &lt;no images&gt;" in text
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["report.html", "results.json"]


def test_a_bundle_that_was_moved_away_is_left_out(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(report.parent, folder)
    shutil.rmtree(folder / "app")
    assert "In your app" not in write_report(folder).read_text()


@pytest.mark.parametrize("damage", ["results.json", "layers.json", "overlays/overlay_0001/float.png"])
def test_a_damaged_file_is_named(report: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(report.parent, folder)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:20])
    before = (folder / "report.html").read_bytes()
    with pytest.raises(DataError, match=re.escape(Path(damage).name)):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
