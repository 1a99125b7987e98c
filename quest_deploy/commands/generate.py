"""`quest-deploy generate`: prompts (or classes, or nothing) in, images out, from any artifact."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb
from quest_deploy.config import BACKENDS, PROVIDERS, GenerateConfig, Provider, RunConfig


@click.command(short_help="Prompts to images, with any artifact.")
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@output_option
@click.option(
    "--prompts-file", type=click.Path(path_type=Path), metavar="FILE", help="Prompts, one a line, instead."
)
@click.option(
    "--backend", type=click.Choice(BACKENDS), help="What runs the model.  [default: what DIR was made for]"
)
@click.option("--steps", type=int, default=GenerateConfig.steps, show_default=True, help="Denoising steps.")
@click.option("--guidance-scale", type=float, default=GenerateConfig.guidance_scale, show_default=True)
@click.option("--negative-prompt", default="", metavar="PROMPT", help="What the images should not show.")
@click.option(
    "--scheduler", metavar="NAME", help="For example ddim, euler, dpm++.  [default: the model's own]"
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the first image; the next has seed + 1."
)
@click.option("--num-images", type=int, default=1, show_default=True, help="Images for each prompt.")
@click.option("--height", type=int, help="Pixels.  [default: the model's own]")
@click.option("--width", type=int, help="Pixels.  [default: the model's own]")
@click.option("--batch-size", type=int, default=GenerateConfig.batch_size, show_default=True)
@click.option(
    "--safety-checker/--no-safety-checker",
    default=GenerateConfig.safety_checker,
    help="Blacken images that the model's own safety checker flags, if it brings one.  [default: do]",
)
@click.option("--threads", type=int, help="CPU threads.  [default: the runtime's choice]")
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    help="ONNX Runtime's execution provider.  [default: cuda where it can run, else cpu]",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=RunConfig.cuda_graphs,
    help="Run TensorRT engines as captured CUDA graphs.  [default: do]",
)
@click.option(
    "--gpu-weights",
    "gpu_weights_gb",
    type=float,
    metavar="GB",
    help="Weights on the GPU, of each engine built with --weight-streaming.  [default: by its free memory]",
)
@overwrite_option
@verb()
def generate(
    *,
    source: Path,
    prompts: tuple[str, ...],
    output: Path,
    prompts_file: Path | None,
    backend: str | None,
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    scheduler: str | None,
    seed: int,
    num_images: int,
    height: int | None,
    width: int | None,
    batch_size: int,
    safety_checker: bool,
    threads: int | None,
    provider: Provider | None,
    cuda_graphs: bool,
    gpu_weights_gb: float | None,
    overwrite: bool,
) -> Result:
    """Draw the PROMPTs with the model, checkpoint, ONNX or engines in DIR.

    A class-conditional model takes names or numbers of classes; an unconditional one takes no PROMPT, and --num-images.
    Writes one PNG per image, with its parameters in the metadata, and a contact sheet.
    """
    if prompts and prompts_file is not None:
        raise click.UsageError("give either PROMPTs or --prompts-file")
    from quest_deploy.artifacts import check_output
    from quest_deploy.prompts import load_prompts

    check_output(output, stage="images", overwrite=overwrite)
    config = GenerateConfig(
        prompts=prompts if prompts_file is None else load_prompts(prompts_file),
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=seed,
        num_images=num_images,
        height=height,
        width=width,
        batch_size=batch_size,
        safety_checker=safety_checker,
    )

    from quest_deploy.pipeline import generate as run

    with show_progress() as progress:
        artifact = run(
            source,
            output,
            config,
            backend=backend,
            threads=threads,
            run=RunConfig(provider=provider, cuda_graphs=cuda_graphs, gpu_weights_gb=gpu_weights_gb),
            progress=progress,
            overwrite=overwrite,
        )
    images = sorted(name for name in artifact.manifest.files if name.startswith("image-"))
    return artifact_result(artifact, f"open {output / 'contact-sheet.png'}", images=images)
