"""Made-up results of every benchmark, in the form in which they are written."""

from __future__ import annotations

from typing import Any

from benchmarks import baselines as baselines_benchmark
from benchmarks import cpu_speed as cpu_speed_benchmark
from benchmarks import families as families_benchmark
from benchmarks import generation as generation_benchmark
from benchmarks import runtimes
from benchmarks.ablation import VARIANTS
from benchmarks.baselines.rows import ROWS as BASELINES
from benchmarks.in_turn import times_as_fast
from benchmarks.initializers import ROWS as STARTS
from benchmarks.order import ratios
from benchmarks.quality import FIGURES, ROWS, difference, differences

HEADER: dict[str, Any] = {
    "date": "2026-01-02T03:04:05Z",
    "machine": {"cpu": "Abacus 3000", "cores": 2, "memory_bytes": 24 << 30},
    "versions": {"python": "3.11.0", "torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "settings": {"recipes": ["w8a8", "w4a8"], "prompts": 3, "steps": 4, "guidance_scale": 3.0},
}


def quality() -> dict[str, Any]:
    recipes = {}
    for name, best in (("w8a8", 40.0), ("w4a8", 30.0)):
        rows: dict[str, dict[str, Any]] = {}
        for worse, row in enumerate(reversed(ROWS)):
            rows[row] = {figure: figures(best - 2 * worse, offset=worse) for figure in FIGURES}
        recipes[name] = {"rows": rows, "differences": differences(rows)}
    made_by = {"w8a8": "this code", "w4a8": "other code"}
    return {**HEADER, "recipes": recipes, "checkpoints_made_by": made_by}


def initializers() -> dict[str, Any]:
    found = {
        row: {figure: figures(28.0, offset=place) for figure in FIGURES} for place, row in enumerate(STARTS)
    }
    recipe = {"rows": found, "difference": difference(found["adaround"], found["gptq"])}
    return {**HEADER, "iterations": 500, "recipes": {"w4a8": recipe}}


def baselines() -> dict[str, Any]:
    recipes = {}
    for name, best in (("w8a8", 40.0), ("w4a8", 30.0)):
        rows: dict[str, dict[str, Any]] = {}
        for worse, row in enumerate(reversed(BASELINES)):
            rows[row] = {figure: figures(best - 2 * worse, offset=worse) for figure in FIGURES}
            rows[row]["validation_loss"] = 0.001 * (worse + 1)
            rows[row]["own_loss"] = {"before": 1.0, "after": 0.5} if row == "quest" else None
            rows[row]["budget"] = {
                "prompts": 96,
                "steps": 25,
                "calibration_samples": 400,
                "training_samples": 9600,
                "seconds": None if row == "minmax" else 12.0,
            }
        recipes[name] = {"rows": rows, "differences": baselines_benchmark.harness.differences(rows)}
    return {**HEADER, "modelopt": "1.2.3", "recipes": recipes}


def figures(mean: float, *, offset: float = 0) -> dict[str, Any]:
    return {
        "mean": mean,
        "per_prompt": [mean - 1, mean, mean + 1 + offset / 10],
        "per_step": [mean + 3, mean + 1, mean - 1, mean - 3],
    }


def outcome(seconds: float | None = 2.0, **changes: Any) -> dict[str, Any]:
    made = {"stage": "x", "command": "quest-deploy x", "exit_code": 0, "resumed": False, "seconds": seconds}
    return {**made, "peak_memory_bytes": None if seconds is None else 512_000_000, **changes}


def cost() -> dict[str, Any]:
    stages = {"fp32": {"export onnxruntime": outcome()}}
    stages |= {"w8a8": {"finetune": outcome(None)}, "w4a8": {"finetune": outcome(9.0, resumed=True)}}
    sizes = {
        "fp32": {"checkpoint": 400, "onnx-onnxruntime": 1000},
        "fp16": {"checkpoint": 200},
        "w8a8": {"checkpoint": 100, "onnx-onnxruntime": 300},
        "w4a8": {"checkpoint": 60, "onnx-onnxruntime": 190},
    }
    helped = {"seconds": 0.31, "python_seconds": 0.02, "ratio": 15.5, "runs": 10}
    ratios = {"w8a8": 0.3, "w4a8": 0.19}
    return {
        **HEADER,
        "stages": stages,
        "denoiser_bytes": sizes,
        "denoiser_onnx_ratio": ratios,
        "help": helped,
    }


def engines() -> dict[str, Any]:
    built = {**outcome(30.0), "builds": True, "size_bytes": {"total": 3_000_000, "unet": 2_000_000}}
    failed = {**outcome(3.0, exit_code=1), "builds": False, "size_bytes": None}
    one = {"fp32": {"onnx_bytes": 4_000_000, "engine_bytes": 5_000_000}}
    return {**HEADER, "engines": {"fp32": built, "w8a8": built, "w4a8": failed}, "one_product": one}


def gate(
    quantity: str, measured: float | str | None, passed: bool | None, rung: str = "onnx"
) -> dict[str, Any]:
    return {
        "rung": rung,
        "kind": "deployment",
        "quantity": quantity,
        "measured": measured,
        "limit": 50.0,
        "at_least": True,
        "unit": "dB",
        "passed": passed,
        "detail": "",
    }


def modes() -> dict[str, Any]:
    """Of one architecture: quantized, and in full precision where a runtime refuses it."""
    shares = {"int8": 0.75, "int4 storage": 0.0, "float": 0.25, "breaks": 0.0}
    gates = {
        "int8 codes that differ": {"measured": 1e-5, "limit": 1e-4, "passed": True},
        "noise SNR, same codes": {"measured": "identical", "limit": 50.0, "passed": True},
        "VAE decoder SNR": {"measured": 123.4, "limit": 90.0, "passed": True},
    }
    row = {
        "products": 4,
        "quantized_products": 3,
        "weight_only_products": 0,
        "share_of_macs": shares,
        "gates": gates,
        "onnxruntime_fused": {"MatMulIntegerToFloat": 2},
        "openvino": {"products": 4, "int8": 3},
        "tensorrt_rtx": {"builds": True},
    }
    failed = {"measured": 12.0, "limit": 90.0, "passed": False}
    refused = {
        **row,
        "quantized_products": 0,
        "gates": {"VAE decoder SNR": failed},
        "onnxruntime_fused": {},
        "openvino": "unsupported",
        "tensorrt_rtx": {"builds": False, "message": "no"},
    }
    return {**HEADER, "kinds": {"flux": {"int8, fp32": row, "none, fp32": refused}}}


def cpu_speed() -> dict[str, Any]:
    """OpenVINO's int8 with collapsed groups is fastest."""
    rows = {row: {"seconds": 6.0, "kernels": {}} for row in cpu_speed_benchmark.ROWS}
    known = {
        "diffusers": 8.0,
        "openvino-int8": 4.0,
        "openvino-attention": 3.0,
        "openvino-nncf": 2.0,
        "openvino-collapsed": 1.6,
    }
    for row, seconds in known.items():
        rows[row]["seconds"] = seconds
    rows["openvino-int8"]["kernels"] = {"i8": 100, "f32": 3}
    speed = {row: 8.0 / one["seconds"] for row, one in rows.items()}
    paired = {row: [known[row], 2 * known[row]] for row in cpu_speed_benchmark.PROFILED}
    over = times_as_fast(paired, cpu_speed_benchmark.NNCF)
    measured = {"speed": speed, "paired_seconds": paired, "over_nncf": over}
    return {**HEADER, "threads": 2, "rounds": 3, "rows": rows, **measured}


def generation() -> dict[str, Any]:
    """ONNX Runtime keeps all limits; OpenVINO's loop waits too long."""
    rows = {
        row: {
            "loop": {"median_s": 8.0 - place, "overhead": 0.01 * (1 + place)},
            "memory_bytes": {"peak": 4_000_000_000 - 1_000_000_000 * place},
        }
        for place, row in enumerate(generation_benchmark.ROWS)
    }
    return {**HEADER, "options": {"steps": 4, "threads": 2, "runs": 2, "rounds": 2}, "rows": rows}


def large() -> dict[str, Any]:
    """An export that took less than it may."""
    export = {"seconds": 600.0, "peak_memory_bytes": 2_000_000_000}
    component = {"size_bytes": 5_000_000_000, "nodes": 5000, "float32_nodes": ["a/Where"]}
    return {**HEADER, "export": export, "components": {"unet": component}, "limit_bytes": 7_500_000_000}


def gpu() -> dict[str, Any]:
    """A GPU that engines load on for any GPU alone, and finetuning that was stopped."""
    parts = {"parts_s": {"record trajectories": 2.0}, "peak_bytes": {"record trajectories": 3e9}}
    refused = {"plan_bytes": 9, "deserialized": False, "said": ["Severity.ERROR: no such GPU"]}
    return {
        **HEADER,
        "gpus": [{"name": "Abacus GPU", "compute_capability": "9.9"}],
        "tensorrt_rtx": {
            "version": "1",
            "as it is": {"plan_bytes": 9, "deserialized": True, "ran": True, "said": []},
            "for this GPU": refused,
        },
        "w4a4": parts,
        "sd15": {"unfinished": parts},
    }


def families() -> dict[str, Any]:
    recipes = {}
    for name, best in (("w8a8", 40.0), ("w4a8", 30.0)):
        rows = {
            row: {figure: figures(best - 2 * worse, offset=worse) for figure in FIGURES}
            for worse, row in enumerate(reversed(families_benchmark.ROWS))
        }
        recipes[name] = {
            "rows": rows,
            "differences": families_benchmark.differences(rows),
            "finetuning": outcome(60.0),
            "deployment": runtimes.summarize(parity_report()),
            "engines": {**outcome(9.0), "builds": True},
        }
    return {**HEADER, "models": dict.fromkeys(families_benchmark.MODELS, recipes)}


def parity_report() -> dict[str, Any]:
    rungs = [
        {"name": name, "against_reference": {"image_psnr_db": {"mean": psnr}}}
        for name, psnr in (("checkpoint", 30.0), ("onnx", 30.1))
    ]
    quantization = {"kind": "quantization", "upper": "model", "lower": "checkpoint"}
    deployment = {
        "kind": "deployment",
        "upper": "checkpoint",
        "lower": "onnx",
        "noise_snr_db": {"median": [70.0, "identical", 45.0]},
        "codes": {"places": 1000, "differing": 1, "fraction": 1e-3, "max_difference": 1, "layers": []},
        "image_psnr_change_db": {"low": 0.0, "mean": 0.1, "high": 0.2, "median": 0.1},
    }
    return {
        "verdict": "failed",
        "prompts": ["a", "b", "c"],
        "rungs": [{"name": "model", "against_reference": None}, *rungs],
        "edges": [quantization, deployment],
        "gates": [
            gate("image PSNR", 30.0, False, rung="checkpoint"),
            gate("noise SNR, same codes", 120.0, True),
            gate("text encoder SNR", "identical", True),
        ],
    }


def ablation() -> dict[str, Any]:
    rows = {
        row: {figure: figures(20.0 + n) for figure in FIGURES}
        for n, row in enumerate(("calibrated", *VARIANTS, "quest"))
    }
    differences = {row: difference(rows[row], rows["short"]) for row in VARIANTS if row != "short"}
    gain = {"low": 1.0, "mean": 2.0, "high": 3.0}
    return {
        **HEADER,
        "recipe": "w4a4",
        "prompts": 48,
        "updates": [30, 60],
        "rows": rows,
        "differences": differences,
        "seconds": dict.fromkeys(VARIANTS, 12.0) | {"short": None},
        "samplers": [
            {
                "scheduler": "ddim",
                "steps": 25,
                "psnr_db": {"calibrated": 19.0, "quest": 21.0},
                "gain_db": gain,
            }
        ],
    }


def kid() -> dict[str, Any]:
    def row(n: int) -> dict[str, Any]:
        return {
            "kid": {"low": 4.0 + n, "mean": 5.0 + n, "high": 6.0 + n},
            "above_fp32": {"low": n - 0.5, "mean": float(n), "high": n + 0.5},
        }

    recipes = {
        name: {label: row(3 * m + n) for n, label in enumerate(("quest", "minmax", "calibrated"), start=1)}
        for m, name in enumerate(("w8a8", "w4a8"))
    }
    fp32 = {"kid": row(0)["kid"]}
    return {**HEADER, "openvino": "1.2.3", "images": 2048, "groups": 32, "fp32": fp32, "recipes": recipes}


def order() -> dict[str, Any]:
    rows = {
        name: {
            "phase_1_ms": time,
            "phase_2_ms": 2 * time,
            "peak_memory_bytes": 10**9,
            "torch_threads": 1,
            "repetitions": 3,
        }
        for name, time in (
            ("here", 1.0),
            ("here-shared", 1.5),
            ("published", 6.0),
            ("published-order", 4.0),
            ("update-a-pass", 7.0),
        )
    }
    return {**HEADER, "recipe": "w4a8", "rows": rows, "ratios": ratios(rows)}
