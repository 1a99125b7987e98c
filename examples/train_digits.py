"""Train a small pixel diffusion model on scikit-learn's handwritten digits (1,797 images of 8x8 pixels).

    python examples/train_digits.py --task class-conditional -o digits-class   # draws the digit asked for
    python examples/train_digits.py --task unconditional -o digits             # draws any digit

Needs `pip install "quest-deploy[examples]"`. Each takes a few minutes on one core; run it again to go on after
an interruption, or after `--minutes` were over. Writes a diffusers directory (`DDPMPipeline`, fp16 safetensors) that
quest-deploy takes, and `samples.png`.

The class-conditional U-Net has one embedding more than there are digits, for guidance: `id2label` in `model_index.json`
names the ten digits, which makes the eleventh the null class. It predicts v on a schedule that ends in pure noise; the
unconditional one predicts noise on an ordinary schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor
from training import Plan, machine, state_beside, train

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NULL_CLASS = len(NAMES)
DROPPED = 0.15
BATCH = 32
TASKS = ("class-conditional", "unconditional")
SAMPLE_STEPS, GUIDANCE_SCALE, ROWS = 25, 2.0, 8


def load_digits() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 1, 8, 8] in [-1, 1] and their digits int64 [1797]."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit(f"{error}; run `pip install 'quest-deploy[examples]'`") from error
    data = datasets.load_digits()
    pixels = torch.from_numpy(data.images.astype(np.float32))[:, None]
    return pixels / 8 - 1, torch.from_numpy(data.target.astype(np.int64))


def make_model(task: str) -> tuple[UNet2DModel, DDIMScheduler]:
    """U-Net with random weights, and the noise schedule."""
    conditional = task == "class-conditional"
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL_CLASS + 1 if conditional else None,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,  # so that a step is linear in the prediction, which finetuning makes use of
        prediction_type="v_prediction" if conditional else "epsilon",
        rescale_betas_zero_snr=conditional,
        timestep_spacing="trailing",
    )
    return unet, scheduler


def batch_loss(
    unet: UNet2DModel, scheduler: DDIMScheduler, images: Tensor, digits: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the prediction on one random batch."""
    chosen = torch.randint(len(images), (BATCH,), generator=generator)
    clean = images[chosen]
    noise = torch.randn(clean.shape, generator=generator)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
    noisy = scheduler.add_noise(clean, noise, timestep)
    conditioning = {}
    if unet.config.num_class_embeds is not None:
        dropped = torch.rand(BATCH, generator=generator) < DROPPED
        conditioning["class_labels"] = digits[chosen].masked_fill(dropped, NULL_CLASS)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timestep)
    prediction = unet(noisy, timestep, **conditioning).sample
    return torch.nn.functional.mse_loss(prediction, target)


@torch.no_grad()
def draw(unet: UNet2DModel, scheduler: Any, seed: int = 0) -> Tensor:
    """Images [n, 1, 8, 8] in [0, 1]: a row of each digit, or 80 of whatever comes."""
    count = ROWS * len(NAMES)
    digits = torch.arange(len(NAMES)).repeat(ROWS)
    image = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(SAMPLE_STEPS)
    for timestep in scheduler.timesteps:
        if unet.config.num_class_embeds is None:
            prediction = unet(image, timestep).sample
        else:
            labels = torch.cat([torch.full_like(digits, NULL_CLASS), digits])
            none, wanted = unet(torch.cat([image] * 2), timestep, class_labels=labels).sample.chunk(2)
            prediction = none + GUIDANCE_SCALE * (wanted - none)
        image = scheduler.step(prediction, timestep, image).prev_sample
    return (image / 2 + 0.5).clamp(0, 1)


def save_sheet(images: Tensor, path: Path, scale: int = 6) -> None:
    """A grid of `ROWS` rows with a grey line between images, enlarged by whole pixels."""
    framed = torch.nn.functional.pad(images[:, 0], (0, 1, 0, 1), value=0.5)
    rows = framed.reshape(ROWS, -1, *framed.shape[1:]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    sheet = Image.fromarray((rows * 255).round().to(torch.uint8).numpy())
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def write_model(unet: UNet2DModel, scheduler: DDIMScheduler, output: Path) -> None:
    """A diffusers directory with fp16 weights; `unet` is left in half precision."""
    DDPMPipeline(unet=unet.half(), scheduler=scheduler).save_pretrained(output)
    if unet.config.num_class_embeds is not None:
        path = output / "model_index.json"
        index = json.loads(path.read_text()) | {"id2label": {str(i): name for i, name in enumerate(NAMES)}}
        path.write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long, finished or not")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, digits = load_digits()
    unet, scheduler = make_model(arguments.task)
    plan = Plan(
        state=state_beside(arguments.output, "training.safetensors"),
        steps=arguments.steps,
        deadline=time.monotonic() + 60 * arguments.minutes,
        learning_rate=2e-3,
        seed=arguments.seed,
    )
    history = train(
        unet,
        lambda generator: batch_loss(unet, scheduler, images, digits, generator),
        plan,
        arguments.task,
    )
    sheet = draw(unet, scheduler)
    write_model(unet, scheduler, arguments.output)
    save_sheet(sheet, arguments.output / "samples.png")
    record = {"unet": history.record(arguments.steps), "machine": machine()}
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    finished = history.step >= arguments.steps
    print(f"{'finished' if finished else 'not finished: run it again to go on'}; see {arguments.output}")


if __name__ == "__main__":
    main()
