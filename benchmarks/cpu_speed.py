"""How fast one denoising step is on this CPU: quest-deploy's int8 ONNX against what else runs the same U-Net.

The U-Net of BK-SDM-Tiny (Stable Diffusion 1.4 with fewer layers, arXiv 2305.15798; 323 million weights, random here),
two samples (both branches of guidance) of 64 x 64 latents. OpenVINO compiles every graph for these shapes. Every
runtime has a process of its own and two threads; they take turns, several times, and the least time of each counts, so
that what else the machine does weighs on all of them alike. OpenVINO's int8 graphs are a few per cent apart, less than
one such time from the next: they are compared a second time, in one process, where they run one after the other, and by
the ratio of neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import nncf_graph, stages
from benchmarks.environment import header
from benchmarks.in_turn import as_text, in_turn, times_as_fast
from benchmarks.settings import Settings, one_update
from benchmarks.tables import Table, number
from quest_deploy.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from numpy import ndarray

NAME = "cpu_speed"
ROWS = {
    "diffusers": "diffusers, eager, fp32",
    "ort-fp32": "ONNX Runtime, fp32",
    "ort-int8": "ONNX Runtime, quest-deploy W8A8",
    "openvino-fp32": "OpenVINO, fp32",
    "openvino-bf16": "OpenVINO, bf16",
    "openvino-int8": "OpenVINO, quest-deploy W8A8",
    "openvino-attention": "OpenVINO, quest-deploy W8A8, queries and keys too",
    "openvino-collapsed": "the same, and one scale for inputs that are shared or whose timestep groups agree",
    "openvino-attention-bf16": "W8A8, queries and keys too, bf16 where the graph has float",
    "openvino-nncf": "OpenVINO, int8 by NNCF",
}
GOAL_OVER_DIFFUSERS, GOAL_OVER_NNCF = 2.5, 1.0
TARGET, STANDARD = "onnxruntime", "tensorrt"
THREADS, BATCH, LATENTS, TOKENS, WIDTH = 2, 2, 64, 77, 768
ROUNDS, RUNS = 3, 5
MEMORY_LIMIT_GB = 20.0
# Of nota-ai/bk-sdm-tiny.
UNET: dict[str, Any] = {
    "sample_size": LATENTS,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
# Whose time is told by kind of layer, and the names of those kinds.
PROFILED = ("openvino-int8", "openvino-attention", "openvino-collapsed", "openvino-nncf")
PROFILE_RUNS = 10
# Rounds of the same rows, in turn in one process.
NNCF, PAIRED_ROUNDS = "openvino-nncf", 40
LAYERS = {
    "Convolution": "convolutions",
    "FullyConnected": "linear layers",
    "FullyConnectedQuantizedLegacy": "linear layers",
    "MatMul": "products of activations",
    "MVN": "norms",
}
# OpenVINO compiles attention into these too: a product of 8-bit queries and keys makes one integer.
SUBGRAPH = "Subgraph"
ATTENTION, ELEMENTWISE, MOVES = "attention", "elementwise", "copies, types and layouts"
KINDS = (*dict.fromkeys(LAYERS.values()), ATTENTION, ELEMENTWISE, MOVES)
# Our exports, and what each recipe has beside 8-bit weights and activations.
EXPORTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "attention": {"attention_bits": 8},
    "collapsed": {"attention_bits": 8, "shared_inputs": True, "collapse_loss_db": 0.1},
}


def run(settings: Settings) -> dict[str, Any]:
    """Make the files, then measure all rows in turn."""
    folder = settings.work / NAME
    model = folder / "model"
    nncf_graph.check_installed()
    if not (model / "model_index.json").is_file():
        subprocess.run([sys.executable, "-m", "benchmarks.cpu_speed", "model", str(folder)], check=True)
    stages.export(settings, "cpu_speed-fp32", model, TARGET)
    for name, changes in EXPORTS.items():
        checkpoint = folder / "checkpoints" / name
        recipe = one_update(weight_bits=8, batch_size=1)
        named = {"name": f"cpu-speed-{name}", "memory_limit_gb": MEMORY_LIMIT_GB}
        recipe = dataclasses.replace(recipe, **(named | changes))
        stages.finetune(settings, recipe, checkpoint, model=model)
        stages.export(settings, f"cpu_speed-{name}", checkpoint, TARGET)
    standard, _ = stages.export(settings, "cpu_speed-fp32", model, STANDARD)
    nncf_graph.make(folder, standard)
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for turn in range(1 if settings.quick else ROUNDS):
        for row, times in found.items():
            print(f"\n{ROWS[row]}, {turn + 1}", flush=True)
            times.append(_in_a_process(row, folder))
    rows = {
        row: {**times[-1], "seconds": min(one["seconds"] for one in times)} for row, times in found.items()
    }
    profiles = {row: _in_a_process(f"profile-{row}", folder) for row in PROFILED}
    base = rows["diffusers"]["seconds"]
    speed = {row: round(base / one["seconds"], 3) for row, one in rows.items()}
    return {
        **header(settings),
        "nncf": nncf_graph.versions(),
        "threads": THREADS,
        "rounds": len(found["diffusers"]),
        "rows": rows,
        "speed": speed,
        **measure_in_turn(folder, 2 if settings.quick else PAIRED_ROUNDS),
        "milliseconds_by_kind": profiles,
    }


def _in_a_process(what: str, folder: Path) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.cpu_speed", what, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_model(folder: Path, unet: dict[str, Any] = UNET, *, half: bool = False) -> None:
    """A pipeline around a U-Net, with text encoder and autoencoder of the bundled model's kind; `half` as float16."""
    import shutil

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    from benchmarks.settings import MODEL

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**unet),
        vae=AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=8),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder / "model", ignore_errors=True)
    if half:
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder / "model")


def inputs(step: int = 0) -> dict[str, ndarray]:
    """What the U-Net is given, float32; the same for every row."""
    import numpy as np

    generator = np.random.default_rng(step)
    return {
        "sample": generator.standard_normal((BATCH, 4, LATENTS, LATENTS), dtype=np.float32),
        "timestep": np.full(1, 999 - 250 * step, dtype=np.float32),
        "encoder_hidden_states": generator.standard_normal((BATCH, TOKENS, WIDTH), dtype=np.float32),
    }


def _onnx(folder: Path, name: str, target: str = TARGET) -> Path:
    path = folder.parent / "onnx" / target / f"cpu_speed-{name}"
    assert (path / MANIFEST_NAME).is_file()
    return path / "unet" / "model.onnx"


def worker(row: str, folder: Path) -> dict[str, Any]:
    """Measure one row in this process: the least seconds of a few runs after one that warms up."""
    runner, version, kernels = RUNNERS[row.partition("-")[0]](row, folder)
    runner()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        runner()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "version": version, "kernels": kernels}


Runner = tuple[Callable[[], Any], str, dict[str, int]]


def _diffusers(row: str, folder: Path) -> Runner:
    import diffusers
    import torch

    torch.set_num_threads(THREADS)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "model" / "unet").eval()
    tensors = {name: torch.from_numpy(value) for name, value in inputs().items()}

    @torch.no_grad()
    def once() -> Any:
        return unet(**tensors).sample

    return once, f"diffusers {diffusers.__version__}, torch {torch.__version__}", {}


def _ort(row: str, folder: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    path = str(_onnx(folder, row.partition("-")[2]))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = inputs()
    return lambda: session.run(None, given), f"onnxruntime {onnxruntime.__version__}", {}


def _openvino(row: str, folder: Path) -> Runner:
    from collections import Counter

    import openvino

    from benchmarks.modes import primitives

    compiled, given = _compiled(row, folder, profiled=False)
    request = compiled.create_infer_request()
    kernels = Counter(name.rpartition("_")[2].lower() for name in primitives(compiled))
    return lambda: request.infer(given), f"openvino {openvino.__version__.split('-')[0]}", dict(kernels)


def _compiled(row: str, folder: Path, *, profiled: bool) -> tuple[Any, dict[str, ndarray]]:
    """A row's graph compiled for the shapes of what it is given."""
    import openvino

    kind = row.partition("-")[2]
    graph = kind.removesuffix("-bf16").replace("bf16", "fp32")
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if kind.endswith("bf16") else "f32",
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profiled,
    }
    core = openvino.Core()
    model = core.read_model(folder / nncf_graph.FILE if kind == "nncf" else _onnx(folder, graph))
    given = inputs()
    model.reshape({name: list(value.shape) for name, value in given.items()})
    return core.compile_model(model, "CPU", options), given


def measure_in_turn(folder: Path, rounds: int) -> dict[str, Any]:
    """OpenVINO's int8 graphs against NNCF's, in a process of its own."""
    seconds = _in_a_process(f"paired-{rounds}", folder)
    return {"paired_seconds": seconds, "over_nncf": times_as_fast(seconds, NNCF)}


def paired(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each row of `PROFILED`."""
    return in_turn({row: _openvino(row, folder)[0] for row in PROFILED}, rounds)


def profile(row: str, folder: Path) -> dict[str, float]:
    """Milliseconds by kind of layer, the least of several runs for each layer."""
    compiled, given = _compiled(row, folder, profiled=True)
    request = compiled.create_infer_request()
    least: dict[str, tuple[str, float]] = {}
    for _ in range(PROFILE_RUNS):
        request.infer(given)
        for layer in request.profiling_info:
            taken = 1000 * layer.real_time.total_seconds()
            kind = _kind_of(layer.node_type, layer.exec_type)
            least[layer.node_name] = (kind, min(taken, least.get(layer.node_name, (kind, taken))[1]))
    found = dict.fromkeys(KINDS, 0.0)
    for kind, taken in least.values():
        found[kind] += taken
    return found


def _kind_of(node_type: str, exec_type: str) -> str:
    if node_type == SUBGRAPH:
        return ATTENTION if exec_type.endswith("_i8") else ELEMENTWISE
    return LAYERS.get(node_type, MOVES)


RUNNERS: dict[str, Callable[[str, Path], Runner]] = {
    "diffusers": _diffusers,
    "ort": _ort,
    "openvino": _openvino,
}


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each runtime; and where the time of those goes that OpenVINO runs in int8."""
    speed, profiles = result["speed"], result.get("milliseconds_by_kind", {})
    whole = sum(profiles["openvino-nncf"].values()) if profiles else 1.0
    layers = Table(
        title="Where a step's time goes in OpenVINO, per cent of NNCF's step",
        columns=("runtime", *KINDS, "all"),
        rows=tuple(
            (
                ROWS[row],
                *(number(100 * found[kind] / whole, 1) for kind in KINDS),
                number(100 * sum(found.values()) / whole, 1),
            )
            for row, found in profiles.items()
        ),
        labels=1,
        note=f"OpenVINO's own counters, the least of {PROFILE_RUNS} runs for each layer. Attention is what OpenVINO "
        "compiles into one kernel around a product of 8-bit queries and keys; where those are float it lies under "
        "elementwise or products of activations. "
        "Elementwise: norms' affine parts, activations, sums and, in quest-deploy's graphs, the multiplications by r "
        "and 1/r of layers with a scale for each timestep group.",
    )
    return [
        Table(
            title="Speed of a denoising step on the CPU",
            columns=("runtime", "times as fast as diffusers", "products by type"),
            rows=tuple(
                (
                    label,
                    number(speed[row]),
                    ", ".join(
                        f"{count} {kind}" for kind, count in sorted(result["rows"][row]["kernels"].items())
                    )
                    or "-",
                )
                for row, label in ROWS.items()
                if row in speed
            ),
            labels=1,
            note="Ratios of one run: BK-SDM-Tiny's U-Net with 323 million random weights, two samples of "
            f"{LATENTS} x {LATENTS} latents, {result['threads']} threads, OpenVINO compiled for these shapes; least "
            f"of {RUNS} runs in each of {result['rounds']} rounds. Goal: quest-deploy's int8 in OpenVINO "
            f"{GOAL_OVER_DIFFUSERS} times as fast as diffusers.",
        ),
        *([_paired_table(result)] if "over_nncf" in result else []),
        *([layers] if profiles else []),
    ]


def _paired_table(result: dict[str, Any]) -> Table:
    rounds = len(result["paired_seconds"][NNCF])
    return Table(
        title="OpenVINO's int8 graphs in turn in one process",
        columns=("runtime", "times as fast as NNCF's"),
        rows=tuple((ROWS[row], as_text(ratio)) for row, ratio in result["over_nncf"].items()),
        labels=1,
        note=f"Median of {rounds} rounds, in each of which every graph runs once, and its 95 % bootstrap interval. "
        f"Goal: {GOAL_OVER_NNCF:g} or more.",
    )


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "model":
        write_model(place)
    elif what == "nncf":
        samples = [inputs(step) for step in range(nncf_graph.CALIBRATION_STEPS)]
        nncf_graph.write(place, _onnx(place, "fp32", STANDARD), samples)
    elif what.startswith("paired-"):
        print(json.dumps(paired(place, int(what.removeprefix("paired-")))))
    elif what.startswith("profile-"):
        print(json.dumps(profile(what.removeprefix("profile-"), place)))
    else:
        print(json.dumps(worker(what, place)))
