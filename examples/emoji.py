"""The emoji of an npm package: 3,786 pictures of 64x64 pixels with two captions each."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGE = "emoji-datasource-google@16.0.0"
DESCRIPTION = "package/emoji.json"
PICTURES = "package/img/google/64/"
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture's file name, captions and subcategory, and whether the captions name a skin tone."""

    image: str
    captions: tuple[str, str]
    subcategory: str
    toned: bool


def download(folder: Path) -> Path:
    """Fetch the package into `folder` once; returns its archive.

    Raises:
        SystemExit: npm is not there, or the registry is not.
    """
    archives = sorted(folder.glob("emoji-datasource-google-*.tgz"))
    if archives:
        return archives[0]
    if shutil.which("npm") is None:
        raise SystemExit(f"npm is not installed; put the archive of {PACKAGE} into {folder} yourself")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"npm cannot get {PACKAGE}: {done.stderr.strip()[-300:]}")
    return next(iter(sorted(folder.glob("*.tgz"))))


def entries(described: list[dict[str, Any]]) -> Iterator[Emoji]:
    """Every picture that `emoji.json` describes, variations of skin tone included."""
    for entry in described:
        names = (entry["name"].lower(), entry["short_name"].replace("_", " ").replace("-", " ").lower())
        kind = entry["subcategory"]
        if entry["has_img_google"]:
            yield Emoji(image=entry["image"], captions=names, subcategory=kind, toned=False)
        for key, variation in entry.get("skin_variations", {}).items():
            if variation["has_img_google"]:
                tones = ", ".join(dict.fromkeys(TONES[part] for part in key.split("-")))
                captions = (f"{names[0]}, {tones}", f"{names[1]}, {tones}")
                yield Emoji(image=variation["image"], captions=captions, subcategory=kind, toned=True)


def load(folder: Path) -> tuple[Tensor, list[Emoji]]:
    """Pictures uint8 [n, 3, 64, 64] on white, and what they show."""
    files: dict[str, bytes] = {}
    # In the order in which they lie: going back unpacks the archive again from its start.
    with tarfile.open(download(folder)) as archive:
        for member in archive:
            if member.name == DESCRIPTION or member.name.startswith(PICTURES):
                stream = archive.extractfile(member)
                assert stream is not None
                files[member.name] = stream.read()
    emoji = list(entries(json.loads(files[DESCRIPTION])))
    pictures = []
    for one in emoji:
        picture = Image.open(io.BytesIO(files[f"{PICTURES}{one.image}"])).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture).convert("RGB").resize((64, 64))
        pictures.append(torch.from_numpy(np.array(flat)).permute(2, 0, 1))
    return torch.stack(pictures), emoji
