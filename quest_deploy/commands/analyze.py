"""`quest-deploy analyze`: what low bits do to each layer of a model, and which layers should have more."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb

DEFAULT_RECIPE = "w4a4"
RESUME_HINT = "run the same command with --resume to go on from the last saved state"


@click.command(short_help="Which layers of a model suffer from low bits.")
@click.argument("model")
@output_option
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What `finetune` made of MODEL, to be compared with it.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="How layers are quantized: w8a8, w4a8, w4a4, or a YAML file.  [default: the checkpoint's, else w4a4]",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts or classes, one a line.  [default: the packaged list, or every class in turn]",
)
@click.option("--num-prompts", type=int, default=8, show_default=True, help="Trajectories to record.")
@click.option("--steps", type=int, default=25, show_default=True, help="Denoising steps of each.")
@click.option(
    "--sensitivity-prompts",
    type=int,
    default=2,
    show_default=True,
    help="Trajectories that each timestep of the sensitivity is measured on.",
)
@click.option(
    "--sensitivity-steps", type=int, default=8, show_default=True, help="Timesteps of the sensitivity."
)
@click.option(
    "--bits",
    metavar="LIST",
    help="What each layer is quantized to alone.  [default: w8,w4,a8,a4 and their pairs]",
)
@click.option("--seed", default=0, show_default=True, help="Seed of noise and of samples.")
@click.option("--average-weight-bits", type=float, metavar="B", help="Budget of mixed precision.")
@click.option(
    "--allocate-bytes",
    type=int,
    metavar="B",
    help="Budget of mixed precision: bytes of the denoiser's quantized weights.",
)
@click.option(
    "--average-activation-bits", type=float, metavar="B", help="Budget, averaged over multiplications."
)
@click.option(
    "--finetune-share",
    type=float,
    metavar="S",
    help="Let the recipe's second phase train the most damaged layers with this share of all weights.",
)
@click.option(
    "--write-recipe",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    help="Where the recipe with the chosen bits and layers is written.",
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped; reuse a finished one.")
@overwrite_option
@verb(when_interrupted=RESUME_HINT)
def analyze(
    *,
    model: str,
    output: Path,
    checkpoint: Path | None,
    recipe: str | None,
    prompts: Path | None,
    num_prompts: int,
    steps: int,
    sensitivity_prompts: int,
    sensitivity_steps: int,
    bits: str | None,
    seed: int,
    average_weight_bits: float | None,
    allocate_bytes: int | None,
    average_activation_bits: float | None,
    finetune_share: float | None,
    write_recipe: Path | None,
    resume: bool,
    overwrite: bool,
) -> Result:
    """Measure activations, time embeddings and the sensitivity of each layer of MODEL.

    MODEL is the full-precision model. Writes analysis.json and analysis.html. With a budget and --write-recipe, also a
    recipe of mixed precision for `finetune`; with --resume from an analysis that is there already.
    """
    from quest_deploy.analyze.config import DEFAULT_BITS, AnalyzeConfig, recipe_of
    from quest_deploy.analyze.mixed import request_of, write_mixed_recipe
    from quest_deploy.artifacts import check_output
    from quest_deploy.errors import ConfigError
    from quest_deploy.files import read_json
    from quest_deploy.prompts import load_prompts
    from quest_deploy.quantize.recipe import load_recipe

    # Before torch is imported and anything is loaded: a mistyped path, recipe or budget is answered at once.
    check_output(output, stage="analysis", overwrite=overwrite or resume)
    if write_recipe is not None and write_recipe.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"--write-recipe {write_recipe} lies in the output '{output}', which holds the analysis alone; "
            "choose a path outside of it"
        )
    config = AnalyzeConfig(
        recipe=recipe_of(checkpoint)
        if recipe is None and checkpoint is not None
        else load_recipe(recipe or DEFAULT_RECIPE),
        prompts=() if prompts is None else load_prompts(prompts),
        num_prompts=num_prompts,
        steps=steps,
        sensitivity_prompts=sensitivity_prompts,
        sensitivity_steps=sensitivity_steps,
        bits=DEFAULT_BITS if bits is None else tuple(name.strip() for name in bits.split(",")),
        seed=seed,
    )
    request = request_of(
        write_recipe,
        finetune_share,
        config.recipe,
        config.bits,
        average_weight_bits=average_weight_bits,
        weight_bytes=allocate_bytes,
        average_activation_bits=average_activation_bits,
    )

    from quest_deploy.analyze.stage import DOCUMENT, PAGE
    from quest_deploy.analyze.stage import analyze as run

    with show_progress() as progress:
        artifact = run(
            model,
            output,
            config,
            checkpoint=checkpoint,
            progress=progress,
            resume=resume,
            overwrite=overwrite,
        )
    result = artifact_result(artifact, page=str(output / PAGE))
    lines, data = [result.text, f"Open {output / PAGE}"], dict(result.data)
    if request is not None:
        chosen = write_mixed_recipe(config.recipe, read_json(output / DOCUMENT)["sensitivity"], request)
        data["recipe"] = chosen
        lines.append(f"{request.path}: {chosen['summary']}")
        lines.append(f"Next: quest-deploy finetune {model} -o DIR --recipe {request.path}")
    return Result(data=data, text="\n".join(lines))
