"""The documentation site: built with warnings as errors, fetching nothing, true to the code."""

from __future__ import annotations

import ast
import html.parser
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_quant
from lightning_quant import errors
from lightning_quant.recipe import HARDWARE_CONFIGS
from tests.helpers.networks import call, quantized

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    reference = (site / "reference/index.html").read_text()
    for name in lightning_quant.__all__:
        assert f'id="lightning_quant.{name}"' in reference, name
    assert "calibration_samples" in reference
    assert not re.search(r":(class|func|meth|data|mod|attr):", reference)


def text_of(node: ast.AST) -> str:
    """The text of an expression, what is filled in as an ellipsis."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def package() -> list[ast.AST]:
    """Everything in the package's source but docstrings."""
    nodes = []
    for path in sorted((ROOT / "lightning_quant").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
            nodes.append(node)
    return nodes


def raised(nodes: list[ast.AST]) -> list[tuple[str, str]]:
    """Every error and every warning in the source: its class, or "Warnings", and its text."""
    warns = re.compile(r"rank_zero_warn|log\.warning|warnings\.warn|\w+\.warnings\.append")
    found = []
    for node in nodes:
        if isinstance(node, ast.Call) and node.args:
            kind, text = ast.unparse(node.func), text_of(node.args[0])
            kind = "Warnings" if warns.fullmatch(kind) else kind
            if (kind == "Warnings" or hasattr(errors, kind)) and re.search(r"[a-z]{2}", text):
                found.append((kind, text))
    return found


def explained() -> dict[str, list[str]]:
    """For each section of the page the parts of messages in it: in headings, lists and first columns of tables."""
    sections = re.split(r"^## (\w+).*$", TROUBLE, flags=re.MULTILINE)[1:]
    places = re.compile(r"^(?:###|-|\|)(.*?)(?:\||$)", re.MULTILINE)
    return {
        name: [part for place in places.findall(body) for part in re.findall(r"`([^`]+)`", place)]
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


def test_the_messages_that_are_explained_still_exist() -> None:
    texts = [text_of(node) for node in package() if isinstance(node, ast.Constant | ast.JoinedStr)]
    for section, parts in explained().items():
        assert [part for part in parts if not any(part in text for text in texts)] == [], section


def test_every_error_and_every_warning_is_explained_under_its_class() -> None:
    sections, messages = explained(), raised(package())
    assert len(messages) > 150
    missing = [(kind, text) for kind, text in messages if not any(part in text for part in sections[kind])]
    assert missing == []


def test_every_class_of_error_has_a_section() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes | {"Warnings"} == set(explained())


def test_every_file_of_the_package_has_its_place_in_the_table() -> None:
    rows = re.findall(r"^\|(.+?)\|", (DOCS / "inside.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    folders = tuple(name for name in named if name.endswith("/"))
    for path in sorted((ROOT / "lightning_quant").rglob("*.py")):
        place = path.relative_to(ROOT / "lightning_quant").as_posix()
        known = place.startswith(folders) or any(name.endswith(path.name) for name in named)
        assert known or path.name.startswith("__"), place
    for name in named:
        assert "/" not in name or list(ROOT.glob(name)) or list((ROOT / "lightning_quant").glob(name)), name


def test_the_tree_of_folders_is_the_package() -> None:
    tree = re.findall(r"^( *)(\w+)/  ", (DOCS / "inside.md").read_text(), re.MULTILINE)
    found, path = set(), []
    for indent, name in tree:
        path[len(indent) // 2 - 1 :] = [name]
        if indent:
            found.add("/".join(path))
    package = ROOT / "lightning_quant"
    folders = {one.relative_to(package).as_posix() for one in package.rglob("*/") if one.name != "__pycache__"}
    assert found == folders


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_python_in_the_guides_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.slow
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


def scales(hardware: str) -> list[str]:
    """What the page says of a hardware config, found in the simulation: convolution, linear layer, ReLU."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    layers: Any = quantized(network, call(torch.randn(1, 3, 8, 8)), hardware=hardware).network
    convolution, _, _, linear = layers.children()
    sizes = [layer.param_quantizers["weight"].shape for layer in (convolution, linear)]
    rounded = convolution.output_quantizers[0] is not None
    return ["one" if math.prod(size) == 1 else "per channel" for size in sizes] + [
        "rounded in between" if rounded else "together"
    ]


def test_the_table_of_hardware_configs_is_true() -> None:
    rows = re.findall(r"^\| (`.*?)\|(.*)\|$", (DOCS / "precision.md").read_text(), re.MULTILINE)
    said = {name: cells.split("|") for names, cells in rows for name in re.findall(r"`(.+?)`", names)}
    for hardware in HARDWARE_CONFIGS:
        assert [cell.strip().partition(",")[0] for cell in said[hardware][:3]] == scales(hardware), hardware
