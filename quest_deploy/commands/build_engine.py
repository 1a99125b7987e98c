"""`quest-deploy build-engine`: ONNX in, TensorRT engines out; TensorRT for RTX needs no GPU to build."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from quest_deploy.build_config import HARDWARE_COMPATIBILITIES, MAX_OPTIMIZATION_LEVEL
from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb
from quest_deploy.config import PROFILE_RANGES, TENSORRT_BACKENDS, BuildConfig, ProfileConfig, ShapeRange
from quest_deploy.errors import ConfigError

_SIZE = re.compile("[0-9]{1,10}")
_SHOWN = 60

logger = logging.getLogger(__name__)


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
@click.option(
    "--profile",
    "more_profiles",
    multiple=True,
    metavar="SPEC",
    help="One more optimization profile, for example batch=1:1:2,height=768,width=512:768:768 (min:opt:max, or one "
    "number), or with sequence=77:77:154 for text embeddings of other lengths; may be given several times.",
)
@click.option(
    "--static",
    is_flag=True,
    help="Accept the optimal shapes alone, guided: fastest, least memory.",
)
@click.option(
    "--optimization-level",
    type=int,
    help=f"0 (builds fastest) to {MAX_OPTIMIZATION_LEVEL} (runs fastest).  [default: the library's own]",
)
@click.option(
    "--workspace",
    "workspace_mb",
    type=int,
    metavar="MIB",
    help="Most scratch memory of a kernel.  [default: no limit]",
)
@click.option("--version-compatible", is_flag=True, help="TensorRT: let later versions load the engines.")
@click.option(
    "--hardware-compatible",
    type=click.Choice(HARDWARE_COMPATIBILITIES),
    default=BuildConfig.hardware_compatible,
    show_default=True,
    help="TensorRT: which other GPUs load the engines.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="N.N",
    help="TensorRT for RTX: build for these GPUs; may be given several times.  "
    "[default: 8.0, 8.6, 8.9, 12.0 and later]",
)
@click.option(
    "--weight-streaming", is_flag=True, help="Let weights stay in host memory while an engine runs."
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Write engines without weights, which `refit` puts in from ONNX_DIR on the machine that runs them.",
)
@click.option(
    "--auto-fallback",
    is_flag=True,
    help="Time the engines' layers on this machine's GPU, and leave products in floats that are slower in low "
    "precision.",
)
@click.option(
    "--jobs", type=int, default=BuildConfig.jobs, show_default=True, help="Components to build at a time."
)
@click.option(
    "--memory-limit",
    "memory_limit_gb",
    type=float,
    metavar="GB",
    help="Memory of this machine that building may take; where it does not suffice, engines are built with less.",
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
    more_profiles: tuple[str, ...],
    static: bool,
    overwrite: bool,
    **options: Any,
) -> Result:
    """Build a TensorRT engine for each component of ONNX_DIR. Engines that are there and up to date are kept.

    A batch counts images: guidance doubles it inside the denoiser. Export ONNX_DIR with the same --target. On a GPU
    that loads the engines, their layers are compared with what `quest-deploy lint` promised.
    """
    low = 1 if min_batch is None else min_batch
    best = low if opt_batch is None else opt_batch
    first = ProfileConfig(
        batch=shape_range(options_of("batch"), low, best, max(4, best) if max_batch is None else max_batch),
        height=size_range("height", min_height, opt_height, max_height),
        width=size_range("width", min_width, opt_width, max_width),
    )
    profiles = [first, *map(parse_profile, more_profiles)]
    if static:
        bounds = {
            "batch": (min_batch, max_batch),
            "height": (min_height, max_height),
            "width": (min_width, max_width),
        }
        if ignored := ignored_by_static(bounds, profiles, more_profiles):
            logger.warning(
                "--static: the denoiser and the autoencoder take the optimal shapes alone (--opt-batch, ...), so "
                "these are ignored: %s",
                ", ".join(ignored),
            )
        profiles = [dataclasses.replace(profile, static=True) for profile in profiles]
    config = BuildConfig(
        backend=backend,  # type: ignore[arg-type]
        **{field.name: getattr(profiles[0], field.name) for field in dataclasses.fields(ProfileConfig)},
        more_profiles=tuple(profiles[1:]),
        **options,
    )

    from quest_deploy.auto_fallback import build_engine as run

    with show_progress() as progress:
        artifact = run(onnx_dir, output, config, progress=progress, overwrite=overwrite)
        proof = None
        # Engines that are up to date may have got their weights by `refit` since.
        stripped = artifact.manifest.details.get("weights_stripped")
        if artifact.manifest.details["verified"] and not stripped:
            from quest_deploy.after_build import prove_here

            proof = prove_here(artifact, onnx_dir)
    on_the_gpu = f"quest-deploy generate {output} PROMPT -o DIR (on a machine with a GPU)"
    weights_first = f"quest-deploy refit {output} {onnx_dir} -o DIR (on the machine with the GPU that draws)"
    result = artifact_result(artifact, weights_first if stripped else on_the_gpu)
    if proof is None:
        return result
    return Result(
        data={**result.data, "layers": proof.to_json()}, text=f"{result.text}\nLayers: {proof.describe()}"
    )


def parse_profile(text: str) -> ProfileConfig:
    """A profile as `--profile` takes it: ``NAME=MIN:OPT:MAX`` or ``NAME=SIZE``, with commas between.

    Raises:
        click.UsageError: it is not of that form.
    """
    ranges: dict[str, Any] = {}
    for part in text.split(","):
        name, _, sizes = part.strip().partition("=")
        numbers = sizes.split(":")
        whole = all(_SIZE.fullmatch(number) for number in numbers)
        if name not in PROFILE_RANGES or name in ranges or not whole or len(numbers) not in (1, 3):
            raise click.UsageError(
                f"--profile: got {part.strip()[:_SHOWN]!r}, expected each of {', '.join(PROFILE_RANGES)} at most once, "
                "as NAME=MIN:OPT:MAX or NAME=SIZE"
            )
        low, best, high = map(int, numbers * 3 if len(numbers) == 1 else numbers)
        ranges[name] = shape_range(f"--profile: {name}", low, best, high)
    return ProfileConfig(**ranges)


def size_range(name: str, low: int | None, best: int | None, high: int | None) -> ShapeRange | None:
    """A range of pixels from the options given; None where none is, which means the model's own size."""
    if low is None and best is None and high is None:
        return None
    if best is None:
        raise click.UsageError(f"--min-{name} and --max-{name} need --opt-{name}, the size to optimize for")
    return shape_range(options_of(name), best if low is None else low, best, best if high is None else high)


def options_of(name: str) -> str:
    """The options that make up the range of one dimension."""
    return f"--min-{name}, --opt-{name}, --max-{name}"


def shape_range(source: str, low: int, best: int, high: int) -> ShapeRange:
    """A range from the options that `source` names.

    Raises:
        ConfigError: it is none; the message begins with `source`.
    """
    try:
        return ShapeRange(min=low, opt=best, max=high)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def ignored_by_static(
    bounds: Mapping[str, tuple[int | None, int | None]],
    profiles: Sequence[ProfileConfig],
    more_profiles: Sequence[str],
) -> list[str]:
    """The options that static shapes ignore, as they were given: bounds of a range other than its optimum.

    Args:
        bounds: Values of the options for minimum and maximum, by dimension; None where they are not given.
        profiles: The first, of these options, and then those of `more_profiles`.
        more_profiles: Values of --profile.
    """
    ignored = [
        f"--{bound}-{name} {size}"
        for name, sizes in bounds.items()
        for bound, size in zip(("min", "max"), sizes, strict=True)
        if size is not None and size != getattr(profiles[0], name).opt
    ]
    for text, profile in zip(more_profiles, profiles[1:], strict=True):
        ranges = [found for name in PROFILE_RANGES if (found := getattr(profile, name)) is not None]
        if any(one.min != one.max for one in ranges):
            ignored.append(f"the bounds of --profile {text}")
    return ignored
