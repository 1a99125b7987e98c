"""Image files: rounding, metadata, thumbnails, captions and the sheet's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from quest_deploy.pipeline.images import (
    CELL,
    MARGIN,
    PAPER,
    Cell,
    contact_sheet,
    save_png,
    thumbnail,
    to_pil,
    wrap,
)


def test_pixels_are_rounded_to_the_nearest() -> None:
    image = to_pil(torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.0]).reshape(1, 1, 4).expand(3, 1, 4))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_channels_and_sides_keep_their_places() -> None:
    image = torch.zeros(3, 2, 5)
    image[1, 1, 4] = 1
    picture = to_pil(image)
    assert picture.size == (5, 2)
    assert picture.getpixel((4, 1)) == (0, 255, 0)


@pytest.mark.parametrize("prompt", ["red heart", "сердце ❤ 心", "two\nlines", ""])
def test_metadata_survives(tmp_path: Path, prompt: str) -> None:
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", {"prompt": prompt, "seed": "7"})
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == {"prompt": prompt, "seed": "7"}


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (30, 50), (512, 768), (2000, 1)])
def test_a_thumbnail_fills_its_cell_and_keeps_its_proportions(size: tuple[int, int]) -> None:
    width, height = thumbnail(Image.new("RGB", size)).size
    assert max(width, height) == CELL
    assert abs(width / CELL - size[0] / max(size)) < 1 / CELL
    assert abs(height / CELL - size[1] / max(size)) <= 1 / CELL


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    enlarged = np.asarray(thumbnail(picture))
    assert np.array_equal(enlarged[1::3, 1::3], np.asarray(picture))


FONT = ImageFont.load_default(15)


@pytest.mark.parametrize(
    "text", ["red heart", "a " * 60, "x" * 300, "one two-three " * 9, "  spaced \n out  "]
)
def test_lines_are_no_wider_than_asked_and_no_more(text: str) -> None:
    lines = wrap(text, FONT, 120, 3)
    assert len(lines) <= 3
    assert all(FONT.getlength(line) <= 120 for line in lines)


def test_wrapping_keeps_every_word_where_there_is_room() -> None:
    text = "smiling face with sunglasses and a hat"
    assert " ".join(wrap(text, FONT, 120, 9)) == text


def test_what_is_cut_ends_in_an_ellipsis() -> None:
    assert wrap("word " * 50, FONT, 120, 2)[-1].endswith("…")


def test_an_empty_caption_has_no_lines() -> None:
    assert wrap("", FONT, 120, 3) == []


def test_every_image_is_on_the_sheet_in_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    cells = [Cell(image=Image.new("RGB", (8, 8), colour), caption="", note="") for colour in colours]
    sheet = contact_sheet(cells, columns=2)
    assert sheet.width == 2 * CELL + 3 * MARGIN
    middle = MARGIN + CELL // 2
    assert sheet.getpixel((middle, middle)) == colours[0]
    assert sheet.getpixel((middle + CELL + MARGIN, middle)) == colours[1]
    assert sheet.getpixel((middle, sheet.height - CELL // 2 - 3 * MARGIN)) == colours[2]


def test_captions_are_written_below_the_images_and_inside_the_sheet() -> None:
    blank = Image.new("RGB", (8, 8), PAPER)
    sheet = np.asarray(contact_sheet([Cell(image=blank, caption="word " * 40, note="seed 1")], columns=1))
    below = sheet[MARGIN + CELL + 2 :]
    assert (below.min(axis=2) < 100).any()
    assert (sheet[-4:] == 255).all() and (sheet[:, -4:] == 255).all()
