"""The small network whose features the kernel distance compares: it was trained to tell emoji's subcategories apart.

It stands where Inception stands in the published KID, so figures compare with each other and with nothing else.
`examples/train_encoder.py` trains it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.settings import ROOT

FILE = ROOT / "benchmarks" / "data" / "emoji-encoder.safetensors"
WIDTHS = (24, 48, 96, 128)
FEATURES = 64


class Encoder(nn.Module):
    """Pictures [n, 3, 64, 64] in [0, 1] -> features [n, FEATURES], of unit variance each over the pictures it knows."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * 16, FEATURES))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        return (self.body(pictures * 2 - 1) - self.mean) / self.deviation

    @torch.no_grad()
    def standardize(self, pictures: Tensor) -> None:
        """Give every feature mean 0 and variance 1 over `pictures`."""
        features = features_of(self, pictures)
        self.mean += self.deviation * features.mean(0)
        self.deviation *= features.std(0)


@torch.no_grad()
def features_of(encoder: Encoder, pictures: Tensor) -> Tensor:
    """float32 [n, FEATURES] of uint8 [n, 3, 64, 64]."""
    return torch.cat([encoder(part.float() / 255) for part in pictures.split(256)])


def save_encoder(encoder: Encoder, file: Path = FILE) -> None:
    """Write it in half precision."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in encoder.state_dict().items()}, file)


def load_encoder(file: Path = FILE) -> Encoder:
    """The committed one."""
    encoder = Encoder()
    encoder.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return encoder.eval()
