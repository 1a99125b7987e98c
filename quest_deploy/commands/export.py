"""`quest-deploy export`: a model or checkpoint in, ONNX out."""

from __future__ import annotations

import logging
from pathlib import Path

import click
from click.core import ParameterSource

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
from quest_deploy.config import DTYPES, MODES, TARGETS, ExportConfig

logger = logging.getLogger(__name__)


@click.command(short_help="A model or checkpoint to ONNX.")
@click.argument("source", metavar="MODEL|CHECKPOINT", type=click.Path(path_type=Path))
@output_option
@click.option("--target", type=click.Choice(TARGETS), default=ExportConfig.target, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="int8: Q/DQ nodes; int4-weight-only: blocks of INT4 weights, float activations; none: full precision.  "
    "[default: int8 for a checkpoint, none for a model]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=ExportConfig.dtype,
    show_default=True,
    help="Of the float operators; those that would lose too much are measured and stay in float32.",
)
@click.option("--opset", type=int, default=ExportConfig.opset, show_default=True)
@click.option("--dry-run", is_flag=True, help="Only tell what memory and disk each component will take.")
@overwrite_option
@verb()
def export(
    *,
    source: Path,
    output: Path,
    target: str,
    mode: str | None,
    dtype: str,
    opset: int,
    dry_run: bool,
    overwrite: bool,
) -> Result:
    """Write MODEL (full precision) or CHECKPOINT (quantized) as ONNX, one graph per component.

    Batch and image size stay dynamic. The target decides how quantizers are written, so that the runtime fuses them.
    """
    from quest_deploy.artifacts import check_output, stage_of

    check_output(output, stage="onnx", overwrite=overwrite)
    if mode is None:
        mode = "int8" if source.exists() and stage_of(source) == "checkpoint" else "none"
    config = ExportConfig(target=target, mode=mode, dtype=dtype, opset=opset)  # type: ignore[arg-type]

    if dry_run:
        return _estimated(source, config)

    from quest_deploy.export.to_onnx import export as run

    with show_progress() as progress:
        artifact = run(source, output, config, progress=progress, overwrite=overwrite)
    build = f"quest-deploy build-engine {output} -o DIR --backend {target}"
    draw = f"quest-deploy generate {output} PROMPT -o DIR"
    if dtype == "bf16":
        draw += " --backend openvino (ONNX Runtime runs no bf16 on the CPU, nor OpenVINO quantized attention in it)"
    written = artifact.manifest.details["opset"]
    if (
        written > opset
        and click.get_current_context().get_parameter_source("opset") == ParameterSource.COMMANDLINE
    ):
        logger.warning("graphs in %s have operator set %d, which they need, not %d", dtype, written, opset)
    return artifact_result(artifact, draw if target == "onnxruntime" else build)


def _estimated(source: Path, config: ExportConfig) -> Result:
    from quest_deploy.export.estimate import estimate

    components = estimate(source, config)
    rows = [("component", "parameters", "disk", "memory")]
    rows += [
        (one.component, f"{one.parameters:,}", format_size(one.disk_bytes), format_size(one.memory_bytes))
        for one in components
    ]
    memory, disk = max(one.memory_bytes for one in components), sum(one.disk_bytes for one in components)
    rows.append(
        ("all", f"{sum(one.parameters for one in components):,}", format_size(disk), format_size(memory))
    )
    data = {"components": [vars(one) for one in components], "memory_bytes": memory, "disk_bytes": disk}
    note = "Memory is the most at once, of the whole process. Nothing was written."
    return Result(data=data, text=f"{format_table(rows)}\n{note}")
