"""Graphs in the form that is made for another runtime: told before minutes are spent on engines."""

from __future__ import annotations

import logging
from pathlib import Path

from quest_deploy.artifacts import Artifact
from quest_deploy.config import TENSORRT_BACKENDS
from quest_deploy.engines.libraries import title_of
from quest_deploy.errors import ArtifactError, EngineBuildError

logger = logging.getLogger(__name__)


def tell_target(source: Artifact, backend: str) -> None:
    """Say that an `onnx` artifact was exported for another runtime, and what to build from instead."""
    target = source.manifest.config.get("target")
    if target is None or target in TENSORRT_BACKENDS:
        return
    logger.warning(
        "'%s' was exported for %s, and engines keep that form (attention is an operator of its own, feed-forwards are "
        "in halves); build engines to deploy from an export with `quest-deploy export --target %s`",
        source.path,
        target,
        backend,
    )


def check_graph(component: str, path: Path, backend: str) -> None:
    """Refuse a graph in the form made for ONNX Runtime that TensorRT does not take, before minutes are spent.

    Raises:
        ArtifactError: the file is missing or is not ONNX.
        EngineBuildError: 4-bit weights are cast to 8 bits in the graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise ArtifactError(
            f"'{path}': cannot be read ({error.strerror}); export the model again with `quest-deploy export`"
        ) from error
    except DecodeError as error:
        raise ArtifactError(
            f"'{path}' is not an ONNX file; export the model again with `quest-deploy export`"
        ) from error
    four_bit = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    }
    cast = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in four_bit]
    if cast:
        raise EngineBuildError(
            f"{component}: {len(cast)} weights are stored in 4 bits and cast to 8 in the graph ('{cast[0].input[0]}' "
            f"is the first), which ONNX Runtime takes and {title_of(backend)} does not; "
            f"export the checkpoint again with `quest-deploy export --target {backend}`"
        )
