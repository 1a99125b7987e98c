"""Train the reference model again: a Stable Diffusion in miniature that draws emoji from their names.

    python examples/train_emoji.py -o emoji-model [--minutes 120]

Gets its pictures from the npm package `emoji-datasource-google` (`npm` is needed once, 74 MB). The architecture is that
of `reference-model/pipeline`; tokenizer, autoencoder, text encoder and U-Net are trained from scratch, as
`reference-model/README.md` says, with one sampling of captions instead of two phases. It takes about two hours on two
cores. Run it again with the same output to go on after an interruption, or after `--minutes` were over: what there is
by then is written as a diffusers directory, with `samples.png` and, in `training.json`, the losses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji import Emoji, load
from PIL import Image
from torch import Tensor, nn
from training import History, Plan, machine, state_beside, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ARCHITECTURE = Path(__file__).resolve().parents[1] / "reference-model" / "pipeline"
VOCABULARY = 3028
VAE_BATCH, VAE_RATE = 32, 2e-3
BATCH, RATE = 64, 1e-3
KL_WEIGHT, MIN_SNR, EMPTY, TONED_WEIGHT = 1e-4, 5.0, 0.1, 0.35
PROMPTS = (
    "grinning face",
    "red heart",
    "pizza",
    "rocket",
    "snowman",
    "sunflower",
    "tiger face",
    "strawberry",
)


def config_of(component: str) -> dict[str, Any]:
    """Configuration of a component of the reference model."""
    content: dict[str, Any] = json.loads((ARCHITECTURE / component / "config.json").read_text())
    return content


def make_tokenizer(emoji: list[Emoji]) -> Any:
    """Byte-pair encoding of the captions, with CLIP's special tokens."""
    template = CLIPTokenizer.from_pretrained(ARCHITECTURE / "tokenizer")
    captions = [caption for one in emoji for caption in one.captions]
    return template.train_new_from_iterator(captions, vocab_size=VOCABULARY)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """int64 [n, 24]."""
    options = {"padding": "max_length", "truncation": True, "max_length": 24, "return_tensors": "pt"}
    return torch.as_tensor(tokenizer(captions, **options).input_ids)


def as_pixels(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """L1 of pixels and of their gradients, squared error, and a little KL divergence."""
    clean = as_pixels(pictures[torch.randint(len(pictures), (VAE_BATCH,), generator=generator)])
    flipped = torch.rand(VAE_BATCH, generator=generator) < 0.5
    clean = torch.where(flipped.reshape(-1, 1, 1, 1), clean.flip(3), clean)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(clean).latent_dist
        got = vae.decode(latents.sample(generator)).sample
    got = got.float()
    edges = sum(F.l1_loss(got.diff(dim=axis), clean.diff(dim=axis)) for axis in (2, 3))
    return F.l1_loss(got, clean) + edges + F.mse_loss(got, clean) + KL_WEIGHT * latents.kl().mean() / 16**2


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of every picture [n, 4, 16, 16], of unit variance; sets the autoencoder's scaling factor."""
    parts = [vae.encode(as_pixels(part)).latent_dist.mode() for part in pictures.split(128)]
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return latents * vae.config.scaling_factor


def denoiser_loss(
    modules: nn.ModuleDict,
    scheduler: DDIMScheduler,
    latents: Tensor,
    tokens: Tensor,
    weights: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Squared error of the predicted noise, weighted by the signal-to-noise ratio capped at 5.

    Args:
        modules: `text_encoder` and `unet`.
        scheduler: Noise schedule.
        latents: [n, 4, 16, 16].
        tokens: int64 [n + 1, 2, 24], two captions of each picture; the last row are empty ones.
        weights: [n], how often each picture is drawn.
        generator: Draws the batch.
    """
    chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
    caption = torch.randint(2, (BATCH,), generator=generator)
    empty = torch.rand(BATCH, generator=generator) < EMPTY
    text = tokens[chosen.masked_fill(empty, len(latents)), caption]
    noise = torch.randn(latents[chosen].shape, generator=generator)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
    noisy = scheduler.add_noise(latents[chosen], noise, timestep)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = modules["text_encoder"](text).last_hidden_state
        prediction = modules["unet"](noisy, timestep, hidden).sample
    signal = scheduler.alphas_cumprod[timestep]
    ratio = signal / (1 - signal)
    error = (prediction.float() - noise).square().flatten(1).mean(1)
    return (error * ratio.clamp(max=MIN_SNR) / ratio).mean()


def write_model(parts: dict[str, Any], output: Path) -> None:
    """A diffusers directory of fp16 weights, and pictures that it draws."""
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    images = pipeline(
        list(PROMPTS),
        num_inference_steps=25,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=generators,
    ).images
    pipeline.to(torch.float16).save_pretrained(output)
    # transformers loads a model in the type that this names, diffusers its own models in float32.
    path = output / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    sheet = Image.new("RGB", (64 * len(images), 64))
    for column, image in enumerate(images):
        sheet.paste(image, (64 * column, 0))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(output / "samples.png")


def train_autoencoder(pictures: Tensor, arguments: argparse.Namespace, state: Path) -> tuple[Any, History]:
    """The autoencoder, as far as its share of the time lets it come."""
    vae = AutoencoderKL.from_config(config_of("vae"))
    share = 0.0 if denoiser_state(state.parent).is_file() else arguments.autoencoder_share
    plan = Plan(
        state=state,
        steps=arguments.autoencoder_steps,
        # Once there is a denoiser of its latents, they stay as they are.
        deadline=time.monotonic() + 60 * share * arguments.minutes,
        learning_rate=VAE_RATE,
        seed=arguments.seed,
    )
    return vae, train(vae, lambda generator: vae_loss(vae, pictures, generator), plan, "autoencoder")


def denoiser_state(work: Path) -> Path:
    """Where the state of text encoder and U-Net is kept."""
    return work / "denoiser.safetensors"


def make_modules(tokenizer: Any) -> nn.ModuleDict:
    """Text encoder for that tokenizer, and U-Net, with random weights."""
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    special |= {"vocab_size": len(tokenizer), "dtype": "float32"}
    return nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**{**config_of("text_encoder"), **special})),
            "unet": UNet2DConditionModel.from_config(config_of("unet")),
        }
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default=Path("artifacts") / "emoji", help="where the package lies"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=120.0,
        help="stop training after so long, finished or not; encoding all pictures before the U-Net's training, and "
        "drawing and writing after it, are done in any case and come on top",
    )
    parser.add_argument(
        "--autoencoder-share", type=float, default=0.15, help="most of the minutes that the autoencoder takes"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=6500, help="of text encoder and U-Net")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    end = time.monotonic() + 60 * arguments.minutes
    torch.manual_seed(arguments.seed)
    pictures, emoji = load(arguments.data)
    print(f"{len(emoji)} pictures", flush=True)
    work = state_beside(arguments.output, "training")
    vae, seen_of_vae = train_autoencoder(pictures, arguments, work / "vae.safetensors")

    tokenizer = make_tokenizer(emoji)
    captions = [caption for one in emoji for caption in one.captions]
    tokens = tokenize(tokenizer, [*captions, "", ""]).reshape(len(emoji) + 1, 2, -1)
    scheduler = DDIMScheduler.from_pretrained(ARCHITECTURE / "scheduler")
    modules = make_modules(tokenizer)
    latents = encode_all(vae, pictures)
    weights = torch.tensor([TONED_WEIGHT if one.toned else 1.0 for one in emoji])
    seen = train(
        modules,
        lambda generator: denoiser_loss(modules, scheduler, latents, tokens, weights, generator),
        Plan(
            state=denoiser_state(work),
            steps=arguments.steps,
            deadline=end,
            learning_rate=RATE,
            average=0.9995,
            seed=arguments.seed,
        ),
        "text encoder and U-Net",
    )
    parts = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, **dict(modules.items())}
    write_model(parts, arguments.output)
    record = {
        "pictures": len(emoji),
        "tokens": len(tokenizer),
        "autoencoder": seen_of_vae.record(arguments.autoencoder_steps),
        "text_encoder_and_unet": seen.record(arguments.steps),
        "machine": machine(),
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    finished = seen.step >= arguments.steps
    print(f"{'finished' if finished else 'not finished: run it again to go on'}; see {arguments.output}")


if __name__ == "__main__":
    main()
