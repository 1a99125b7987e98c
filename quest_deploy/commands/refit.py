"""`quest-deploy refit`: engines without weights and their ONNX in, engines that run out."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.verb import Result, artifact_result, output_option, overwrite_option, verb


@click.command(short_help="Weights into engines built without.")
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@output_option
@overwrite_option
@verb()
def refit(*, engines: Path, onnx_dir: Path, output: Path, overwrite: bool) -> Result:
    """Put the weights of ONNX_DIR into ENGINES, which `build-engine --strip-weights` made from it.

    Runs on the machine with the GPU that will draw. To write them in place: -o ENGINES --overwrite.
    """
    from quest_deploy.engines.refit import refit as run

    artifact = run(engines, onnx_dir, output, overwrite=overwrite)
    return artifact_result(artifact, f"quest-deploy generate {output} PROMPT -o DIR")
