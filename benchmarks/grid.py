"""One picture of what each row drew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL, CAPTION, FONT_SIZE = 96, 6, 120, 34, 12
INK, PAPER = (32, 33, 36), (255, 255, 255)


def save_grid(file: Path, rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> None:
    """Write rows of images with a label at their left and the prompts above.

    Args:
        file: A PNG.
        rows: Label and images; as many images as captions in each.
        captions: The prompts.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width = LABEL + len(captions) * (CELL + GAP)
    sheet = Image.new("RGB", (width, CAPTION + len(rows) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.multiline_text((LABEL + column * (CELL + GAP), 2), _broken(caption), INK, font, spacing=2)
    for row, (label, images) in enumerate(rows):
        top = CAPTION + row * (CELL + GAP)
        draw.multiline_text((4, top + CELL // 3), label, INK, font, spacing=2)
        for column, image in enumerate(images):
            # A picture of a few pixels is shown as its pixels.
            whole = CELL % image.width == 0 and CELL % image.height == 0
            way = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
            cell = image.convert("RGB").resize((CELL, CELL), way)
            sheet.paste(cell, (LABEL + column * (CELL + GAP), top))
    file.parent.mkdir(parents=True, exist_ok=True)
    # 256 colours keep the file small; the figures are taken from the images themselves.
    sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)


def _broken(caption: str) -> str:
    """`caption` on at most two lines of about equal length."""
    spaces = [index for index, letter in enumerate(caption) if letter == " "]
    if len(caption) <= CELL // 7 or not spaces:
        return caption
    middle = min(spaces, key=lambda index: abs(index - len(caption) / 2))
    return caption[:middle] + "\n" + caption[middle + 1 :]
