"""The documentation site: built with warnings as errors, fetching nothing, true to the code."""

from __future__ import annotations

import ast
import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_quant
from lightning_quant import errors

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Resources(html.parser.HTMLParser):
    """Collects what a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "preload", "icon"):
            self.found.append(given.get("href") or "")


def test_no_page_fetches_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        text = page.read_text()
        parser = Resources()
        parser.feed(text)
        assert parser.found
        assert not [one for one in parser.found if one.startswith(("http", "//"))], page
        assert 'class="mermaid"' not in text  # the theme would load it from elsewhere


def test_every_public_name_has_an_entry(site: Path) -> None:
    reference = (site / "reference/index.html").read_text()
    for name in lightning_quant.__all__:
        assert f'id="lightning_quant.{name}"' in reference, name
    assert "calibration_samples" in reference
    assert not re.search(r":(class|func|meth|data|mod|attr):", reference)


def messages() -> str:
    """All texts of the package, what is filled in as an ellipsis."""
    texts = []
    for path in (ROOT / "lightning_quant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_that_are_explained_still_exist() -> None:
    known = messages()
    headings = re.findall(r"^### `(.+)`$", TROUBLE, re.MULTILINE)
    assert len(headings) > 40
    assert [heading for heading in headings if heading not in known] == []


def test_every_class_of_error_has_a_section() -> None:
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    sections = re.findall(r"^## (\w+)", TROUBLE, re.MULTILINE)
    assert set(classes) - {"LightningQuantError"} <= set(sections)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_python_in_the_guides_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")


def test_the_quickstart_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    (tmp_path / "quickstart.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QAIHUB_CLIENT_INI": str(tmp_path / "none.ini")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"RungResult\(rung='\w+', metric=0\.[89]", done.stdout)
    for name in ("quadrants.onnx", "quadrants.aimet/model.encodings", "manifest.json"):
        assert (tmp_path / "export/quadrants" / name).is_file()
    assert "W8A8 needs" in (tmp_path / "export/quadrants.report/report.html").read_text()
