"""`quest-deploy finetune`: a diffusers model in, a quantized checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import (
    Result,
    artifact_result,
    format_size,
    format_table,
    output_option,
    overwrite_option,
    verb,
)

if TYPE_CHECKING:
    from quest_deploy.config import FinetuneConfig

RESUME_HINT = "run the same command with --resume to go on from the last saved state"


@click.command(short_help="A diffusers model to a quantized checkpoint.")
@click.argument("model")
@output_option
@click.option(
    "--recipe",
    default="w8a8",
    show_default=True,
    metavar="NAME|FILE",
    help="w8a8, w4a8, w4a4, paper-sd, paper-cldm, paper-uncond, or a YAML file.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibration prompts or classes, one a line.  [default: the packaged list, or every class]",
)
@click.option("--seed", default=0, show_default=True, help="Seed of noise and of sample order.")
@click.option(
    "--lora",
    "loras",
    type=(str, float),
    multiple=True,
    metavar="FILE SCALE",
    help="A LoRA to merge into MODEL first, with its scale; may be repeated.",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="Where to run: cpu, cuda or cuda:N."
)
@click.option("--dry-run", is_flag=True, help="Only tell what time, memory and disk each part will take.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@overwrite_option
@verb(when_interrupted=RESUME_HINT, together=True)
def finetune(
    *,
    model: str,
    output: Path,
    recipe: str,
    prompts: Path | None,
    seed: int,
    loras: tuple[tuple[str, float], ...],
    device: str,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
) -> Result:
    """Quantize MODEL with QuEST and finetune it against its own full-precision outputs.

    MODEL is a diffusers directory, a hub id, or a single .safetensors file. No training images are needed. Several
    processes share the work where `accelerate launch -m quest_deploy.commands finetune ...` starts them.
    """
    from quest_deploy.artifacts import check_output
    from quest_deploy.config import FinetuneConfig, LoraConfig
    from quest_deploy.prompts import load_prompts
    from quest_deploy.quantize.recipe import load_recipe

    # Before torch is imported and anything is loaded: a mistyped path or recipe is answered at once.
    check_output(output, stage="checkpoint", overwrite=overwrite or resume)
    texts = () if prompts is None else load_prompts(prompts)
    config = FinetuneConfig(
        recipe=load_recipe(recipe),
        prompts=texts,
        seed=seed,
        device=device,
        loras=tuple(LoraConfig(file=file, scale=scale) for file, scale in loras),
    )
    if dry_run:
        return _estimated(model, config)

    from quest_deploy.quantize.finetune import finetune as run

    with show_progress() as progress:
        artifact = run(model, output, config, progress=progress, resume=resume, overwrite=overwrite)
    return artifact_result(artifact, f"quest-deploy export {output} -o DIR")


def _estimated(model: str, config: FinetuneConfig) -> Result:
    from quest_deploy.quantize.estimate import estimate
    from quest_deploy.quantize.estimate_parts import most_on_disk

    parts, speed = estimate(model, config)
    rows = [("part", "time", "memory", "disk")]
    rows += [
        (
            part.part,
            _format_time(part.seconds),
            format_size(part.memory_bytes),
            format_size(part.disk_bytes + part.passing_bytes),
        )
        for part in parts
    ]
    total_s = sum(part.seconds for part in parts)
    memory = max(part.memory_bytes for part in parts)
    disk = most_on_disk(parts)
    rows.append(("all", _format_time(total_s), format_size(memory), format_size(disk)))
    how = "timed" if speed.measured else "counted, not timed"
    note = (
        f"One pass of a pair was {how}: {speed.forward_s:.3g} s, with gradients {speed.update_s:.3g} s. Memory is that "
        "of tensors; add about 0.5 GB for the libraries. Nothing was written."
    )
    data = {
        "parts": [vars(part) for part in parts],
        "total_s": total_s,
        "memory_bytes": memory,
        "disk_bytes": disk,
        "measured": speed.measured,
    }
    return Result(data=data, text=f"{format_table(rows)}\n{note}")


def _format_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
