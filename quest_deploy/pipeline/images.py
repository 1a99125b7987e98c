"""Image files: PNGs that carry their parameters, and contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

CELL = 192
MARGIN = 16
FONT_SIZE = 15
LINE_HEIGHT = 20
MAX_LINES = 3
MAX_COLUMNS = 8
MAX_CELLS = 96
INK, FAINT, FRAME, PAPER = (32, 33, 36), (112, 117, 122), (225, 227, 230), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image of a contact sheet, with its caption and a fainter note below."""

    image: Image.Image
    caption: str
    note: str = ""


def to_pil(image: Tensor) -> Image.Image:
    """Float [3, h, w] in [0, 1] -> 8-bit RGB, rounded as diffusers does; [1, h, w] -> grey."""
    pixels = (image.float() * 255).round().to(torch.uint8)
    if pixels.shape[0] == 1:
        return Image.fromarray(pixels[0].cpu().contiguous().numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG with `metadata` as text chunks."""
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    image.save(path, pnginfo=chunks)


def thumbnail(image: Image.Image, side: int = CELL) -> Image.Image:
    """`image` fitted into a square of `side` pixels: small ones enlarged by whole pixels, large ones shrunk."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    enlarged_exactly = scale >= 1 and float(scale).is_integer()
    method = Image.Resampling.NEAREST if enlarged_exactly else Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), method)


def wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int
) -> list[str]:
    """Break `text` into at most `max_lines` lines that are no wider than `width`; what is cut ends in an ellipsis."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        end = _fitting(rest, font, width)
        if end < len(rest):
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1].rstrip()
        lines[-1] = last + "…"
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many characters of `text` fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def contact_sheet(cells: Sequence[Cell], *, columns: int) -> Image.Image:
    """Lay out `cells` in rows of `columns`, captions below the images."""
    fonts = (ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE - 3))
    pictures = [thumbnail(cell.image) for cell in cells]
    captions = [wrap(cell.caption, fonts[0], CELL, MAX_LINES) for cell in cells]
    starts = range(0, len(cells), columns)
    tallest = [max(picture.height for picture in pictures[start : start + columns]) for start in starts]
    lines = [max(len(caption) for caption in captions[start : start + columns]) + 1 for start in starts]
    heights = [
        picture + LINE_HEIGHT * count + 2 * MARGIN for picture, count in zip(tallest, lines, strict=True)
    ]
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (CELL + MARGIN), MARGIN + sum(heights[:row])
        picture = pictures[index]
        corner = left + (CELL - picture.width) // 2
        sheet.paste(picture, (corner, top))
        draw.rectangle((corner - 1, top - 1, corner + picture.width, top + picture.height), outline=FRAME)
        y = top + tallest[row] + MARGIN // 2
        for line in captions[index]:
            draw.text((left, y), line, INK, fonts[0])
            y += LINE_HEIGHT
        draw.text((left, y), cell.note, FAINT, fonts[1])
    return sheet
