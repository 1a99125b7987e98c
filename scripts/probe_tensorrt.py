"""Ask TensorRT for RTX whether it runs on this GPU: build a product, load it, run it; its own words as JSON.

    python -m scripts.probe_tensorrt FILE.json

A build for any GPU and one for this very GPU are tried.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROWS, INNER, COLUMNS = 64, 128, 64
KEPT = 40


def main() -> int:
    """Write what was found; exit code 1 where no engine ran."""
    import tensorrt_rtx as trt

    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                said.append(f"{severity}: {message}")

    logger = Logger()
    found: dict[str, Any] = {"version": trt.__version__}
    for label, current in (("as it is", False), ("for this GPU", True)):
        found[label] = tried(trt, logger, current=current)
        found[label]["said"] = said[-KEPT:]
        said.clear()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0 if any(found[label].get("ran") for label in ("as it is", "for this GPU")) else 1


def tried(trt: Any, logger: Any, *, current: bool) -> dict[str, Any]:
    """Build, load and run one matrix product; how far that went."""
    weight = np.random.default_rng(0).standard_normal((INNER, COLUMNS)).astype(np.float32)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (ROWS, INNER))
    none = trt.MatrixOperation.NONE
    w = network.add_constant(weight.shape, weight).get_output(0)
    y = network.add_matrix_multiply(x, none, w, none).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if current:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"plan_bytes": None}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    found = {"plan_bytes": plan.nbytes, "deserialized": engine is not None}
    if engine is None:
        return found
    import torch

    context = engine.create_execution_context()
    given, got = torch.randn(ROWS, INNER, device="cuda"), torch.empty(ROWS, COLUMNS, device="cuda")
    context.set_tensor_address("x", given.data_ptr())
    context.set_tensor_address("y", got.data_ptr())
    found["ran"] = context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    right = given.double() @ torch.from_numpy(weight).cuda().double()
    return found | {"largest_error": float((got - right).abs().max())}


if __name__ == "__main__":
    sys.exit(main())
