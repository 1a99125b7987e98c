"""Train the encoder behind the benchmarks' kernel distance: it tells the 99 subcategories of emoji apart.

    python examples/train_encoder.py --data artifacts/emoji [--minutes 10]

Writes `benchmarks/data/`: the encoder, and, for 2,048 of the emoji, the prompts and the features of the real pictures.
A few minutes on one core; run it again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji import load
from safetensors.torch import save_file
from torch import Tensor, nn
from training import Plan, train

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.encoder import FEATURES, FILE, Encoder, features_of, load_encoder, save_encoder
from benchmarks.kid import PROMPTS, REAL

BATCH, SHIFT, HELD_OUT = 64, 4, 10
COUNT = 2048


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture flipped or not, and shifted by up to `SHIFT` pixels on white."""
    count, _, height, width = pictures.shape
    flip = torch.rand(count, generator=generator) < 0.5
    pictures = torch.where(flip.reshape(-1, 1, 1, 1), pictures.flip(3), pictures)
    padded = F.pad(pictures, (SHIFT,) * 4, value=1.0)
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    return torch.stack(
        [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, corners, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("artifacts") / "emoji", help="where the package lies"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long, finished or not")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    pictures, emoji = load(arguments.data)
    names = sorted({one.subcategory for one in emoji})
    labels = torch.tensor([names.index(one.subcategory) for one in emoji])
    # Skin tones of one emoji stay on one side.
    groups = sorted({one.captions[0].partition(",")[0] for one in emoji})
    held = torch.tensor([groups.index(one.captions[0].partition(",")[0]) % HELD_OUT == 0 for one in emoji])
    training = (~held).nonzero().flatten()
    encoder = Encoder()
    modules = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(FEATURES, len(names))})

    def loss(generator: torch.Generator) -> Tensor:
        chosen = training[torch.randint(len(training), (BATCH,), generator=generator)]
        features = encoder(moved(pictures[chosen].float() / 255, generator))
        return F.cross_entropy(modules["head"](F.silu(features)), labels[chosen], label_smoothing=0.1)

    plan = Plan(
        state=arguments.data / "encoder-training.safetensors",
        steps=arguments.steps,
        deadline=time.monotonic() + 60 * arguments.minutes,
        learning_rate=2e-3,
        weight_decay=0.05,
        seed=arguments.seed,
    )
    history = train(modules, loss, plan, "encoder")
    with torch.no_grad():
        guesses = modules["head"](F.silu(features_of(encoder, pictures))).argmax(1)
    for name, part in (("known", ~held), ("held-out", held)):
        right = (guesses == labels)[part].float().mean()
        print(
            f"{name} emoji: {right:.1%} of {int(part.sum())} in the right one of {len(names)} subcategories"
        )

    generator = torch.Generator().manual_seed(arguments.seed)
    # All emoji without a skin tone, then some with one.
    order = sorted(range(len(emoji)), key=lambda index: emoji[index].toned)
    plain = sum(not one.toned for one in emoji)
    toned = torch.tensor(order[plain:])[torch.randperm(len(emoji) - plain, generator=generator)]
    chosen = (order[:plain] + toned.tolist())[:COUNT]
    encoder.standardize(pictures[chosen])
    save_encoder(encoder)
    encoder = load_encoder()  # in half precision, as the benchmark has it
    PROMPTS.write_text("".join(f"{emoji[index].captions[0]}\n" for index in chosen), encoding="utf-8")
    save_file({"features": features_of(encoder, pictures[chosen]).half()}, REAL)
    finished = history.step >= arguments.steps
    print(f"{'finished' if finished else 'not finished: run it again to go on'}; see {FILE.parent}")


if __name__ == "__main__":
    main()
