"""`quest-deploy finetune`: a diffusers model in, a quantized checkpoint out."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb

RESUME_HINT = "run the same command with --resume to go on from the last saved state"


@click.command(short_help="A diffusers model to a quantized checkpoint.")
@click.argument("model")
@output_option
@click.option(
    "--recipe",
    default="w8a8",
    show_default=True,
    metavar="NAME|FILE",
    help="w8a8, w4a8, w4a4, or a YAML file.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibration prompts or classes, one a line.  [default: the packaged list, or every class]",
)
@click.option("--seed", default=0, show_default=True, help="Seed of noise and of sample order.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@overwrite_option
@verb(when_interrupted=RESUME_HINT)
def finetune(
    *, model: str, output: Path, recipe: str, prompts: Path | None, seed: int, resume: bool, overwrite: bool
) -> Result:
    """Quantize MODEL with QuEST and finetune it against its own full-precision outputs.

    MODEL is a diffusers directory, a hub id, or a single .safetensors file. No training images are needed.
    """
    from quest_deploy.artifacts import check_output
    from quest_deploy.config import FinetuneConfig
    from quest_deploy.prompts import load_prompts
    from quest_deploy.quantize.recipe import load_recipe

    # Before torch is imported and anything is loaded: a mistyped path or recipe is answered at once.
    check_output(output, stage="checkpoint", overwrite=overwrite or resume)
    texts = () if prompts is None else load_prompts(prompts)
    config = FinetuneConfig(recipe=load_recipe(recipe), prompts=texts, seed=seed)

    from quest_deploy.quantize.finetune import finetune as run

    with show_progress() as progress:
        artifact = run(model, output, config, progress=progress, resume=resume, overwrite=overwrite)
    return artifact_result(artifact, f"quest-deploy export {output} -o DIR")
