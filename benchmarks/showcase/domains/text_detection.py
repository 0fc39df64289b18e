"""CRAFT, EasyOCR's detector (VGG16 and a U-Net), on words over photographs: F1 of the boxes it finds."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors
from benchmarks.showcase.domains.text_recognition import (
    CALIBRATED,
    FACES,
    JUDGED,
    font,
    forms,
    part_of_easyocr,
    photographs,
    weights_of,
)
from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD

HEIGHT, WIDTH, VALIDATION = 256, 384, 32
WORDS = 4  # in each image, one in each quarter
OVERLAP = 0.5


class Found(Judged):
    """Takes boxes from the score maps and counts those that overlap with a word."""

    counts: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("counts", torch.zeros(3), persistent=False)  # found, of boxes, of words

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, words = batch
        scores, _ = self.model(images)
        for one, wanted in zip(scores.float().cpu().numpy(), words.float().cpu(), strict=True):
            boxes = boxes_of(one)
            self.counts += torch.tensor([matches(boxes, wanted), len(boxes), len(wanted)], device=self.counts.device)

    def on_validation_epoch_end(self) -> None:
        found, boxes, words = self.counts.tolist()
        self.log("val_f1", 2 * found / (boxes + words))
        self.counts.zero_()


def boxes_of(scores: np.ndarray) -> Tensor:
    """Return boxes in pixels of the image, by EasyOCR's own thresholds.

    Args:
        scores: of characters and of the gaps between them, (height, width, 2), at half the size of the image.
    """
    from scipy import ndimage

    characters, gaps = scores[..., 0], scores[..., 1]
    regions, _ = ndimage.label((characters > 0.4) | (gaps > 0.4))
    boxes = []
    for index, around in enumerate(ndimage.find_objects(regions), 1):
        inside = (regions[around] == index) & ~((gaps[around] > 0.4) & (characters[around] <= 0.4))
        size = int((regions[around] == index).sum())
        if size < 10 or characters[around][regions[around] == index].max() < 0.7 or not inside.any():
            continue
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        high, wide = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        margin = int(np.sqrt(size * min(high, wide) / (high * wide)) * 2) // 2  # maps end within the characters
        top, left = around[0].start + int(rows[0]), around[1].start + int(columns[0])
        boxes.append([left - margin, top - margin, left + wide + margin, top + high + margin])
    return 2 * torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def matches(boxes: Tensor, words: Tensor) -> int:
    """Return how many words have a box of their own."""
    overlaps = box_iou(boxes, words)
    found = 0
    while overlaps.numel() and overlaps.max() >= OVERLAP:
        box, word = divmod(int(overlaps.argmax()), len(words))
        overlaps[box], overlaps[:, word] = 0, 0
        found += 1
    return found


def drawn(words: list[str], files: list[Path], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return photographs with a word in each quarter, and the boxes of these, (count, 4, 4)."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor

    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    images, boxes = [], torch.zeros(count, WORDS, 4)
    for index in range(count):
        with Image.open(files[index * len(files) // count]) as photograph:
            full = photograph.convert("RGB").resize((WIDTH, WIDTH * photograph.height // photograph.width))
        top = draw(0, full.height - HEIGHT)
        image = full.crop((0, top, WIDTH, top + HEIGHT))
        for quarter in range(WORDS):
            number = index * WORDS + quarter
            word, face = words[number % len(words)], FACES[number % len(FACES)]
            size = next(size for size in range(draw(14, 32), 0, -1) if font(face, size).getlength(word) < 176)
            left, upper, right, lower = font(face, size).getbbox(word)
            x = draw(4, WIDTH // 2 - 4 - int(right - left)) + quarter % 2 * WIDTH // 2 - int(left)
            y = draw(4, HEIGHT // 2 - 4 - int(lower - upper)) + quarter // 2 * HEIGHT // 2 - int(upper)
            box = (int(x + left), int(y + upper), int(x + right), int(y + lower))
            mean = pil_to_tensor(image.crop(box)).float().mean()
            ink = int(mean) + (1 if mean < 128 else -1) * draw(60, 120)
            tint = tuple(ink + draw(-30, 30) for _ in range(3))
            ImageDraw.Draw(image).text((x, y), word, fill=tint, font=font(face, size))
            boxes[index, quarter] = torch.tensor(box)
        images.append(normalize(pil_to_tensor(image).float() / 255, list(IMAGE_MEAN), list(IMAGE_STD)))
    return torch.stack(images), boxes


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the network and its photographs."""
    network = part_of_easyocr("craft").CRAFT()
    network.load_state_dict(weights_of("craft_mlt_25k.pth"))
    calibration = drawn(forms(CALIBRATED, 4 * len(CALIBRATED)), photographs(camvid, "train"), CALIBRATION, seed=0)
    validation = drawn(forms(JUDGED, 4 * len(JUDGED)), photographs(camvid, "val"), VALIDATION, seed=1)
    return Found(network), Tensors(calibration[:1], validation, batch_size=4)


DOMAIN = Domain("text detection", "CRAFT", build, "val_f1", "F1 of boxes")
