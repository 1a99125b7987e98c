"""`quest-deploy build-engine`: ONNX in, TensorRT engines out; TensorRT for RTX needs no GPU to build."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb
from quest_deploy.config import TENSORRT_BACKENDS, BuildConfig, ShapeRange


@click.command("build-engine", short_help="ONNX to TensorRT engines.")
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--backend", type=click.Choice(TENSORRT_BACKENDS), default=BuildConfig.backend, show_default=True
)
@click.option("--min-batch", type=int, help="Fewest images in a batch.  [default: 1]")
@click.option("--opt-batch", type=int, help="Batch to optimize for.  [default: min-batch]")
@click.option("--max-batch", type=int, help="Most images in a batch.  [default: 4, or opt-batch if larger]")
@click.option("--min-height", type=int, help="Pixels.  [default: opt-height]")
@click.option("--opt-height", type=int, help="Pixels.  [default: the model's own]")
@click.option("--max-height", type=int, help="Pixels.  [default: opt-height]")
@click.option("--min-width", type=int, help="Pixels.  [default: opt-width]")
@click.option("--opt-width", type=int, help="Pixels.  [default: the model's own]")
@click.option("--max-width", type=int, help="Pixels.  [default: opt-width]")
@click.option(
    "--timing-cache", metavar="FILE", help="Reuse and extend the timings of earlier builds on this machine."
)
@overwrite_option
@verb()
def build_engine(
    *,
    onnx_dir: Path,
    output: Path,
    backend: str,
    min_batch: int | None,
    opt_batch: int | None,
    max_batch: int | None,
    min_height: int | None,
    opt_height: int | None,
    max_height: int | None,
    min_width: int | None,
    opt_width: int | None,
    max_width: int | None,
    timing_cache: str | None,
    overwrite: bool,
) -> Result:
    """Build a TensorRT engine for each component of ONNX_DIR, with one optimization profile.

    A batch counts images: guidance doubles it inside the denoiser. Export ONNX_DIR with the same --target.
    """
    from quest_deploy.artifacts import check_output

    check_output(output, stage="engines", overwrite=overwrite)
    low = 1 if min_batch is None else min_batch
    best = low if opt_batch is None else opt_batch
    config = BuildConfig(
        backend=backend,  # type: ignore[arg-type]
        batch=ShapeRange(min=low, opt=best, max=max(4, best) if max_batch is None else max_batch),
        height=size_range("height", min_height, opt_height, max_height),
        width=size_range("width", min_width, opt_width, max_width),
        timing_cache=timing_cache,
    )

    from quest_deploy.engines.trt_build import build_engine as run

    with show_progress() as progress:
        artifact = run(onnx_dir, output, config, progress=progress, overwrite=overwrite)
    return artifact_result(
        artifact, f"quest-deploy generate {output} PROMPT -o DIR (on a machine with a GPU)"
    )


def size_range(name: str, low: int | None, best: int | None, high: int | None) -> ShapeRange | None:
    """A range of pixels from the options given; None where none is, which means the model's own size."""
    if low is None and best is None and high is None:
        return None
    if best is None:
        raise click.UsageError(f"--min-{name} and --max-{name} need --opt-{name}, the size to optimize for")
    return ShapeRange(min=best if low is None else low, opt=best, max=best if high is None else high)
