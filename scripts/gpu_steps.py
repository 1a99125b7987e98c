"""The steps of the GPU check, what matters most first: see ``scripts/gpu_check.sh``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.settings import MODEL
from quest_deploy.engines.arithmetic import RTX_WHERE_ASKED, parse_capability

RUNS = "run its engines, with CUDA graphs and without"
SAMPLING = ("--steps", "20", "--guidance-scale", "3")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process.

    Attributes:
        name: For the JSON.
        command: Arguments of the interpreter.
        makes: What it leaves in the output directory.
        needs: What it reads from there.
        after: The step without whose success this one would show nothing.
    """

    name: str
    command: tuple[str, ...]
    makes: str = ""
    needs: tuple[str, ...] = ()
    after: str = ""


def verb(*words: str) -> tuple[str, ...]:
    """A call of the command line."""
    return ("-m", "quest_deploy.commands", *words, "--json")


def steps(output: Path, recipe: Path, backend: str, capability: str) -> tuple[Step, ...]:
    """Everything, what matters most first.

    Args:
        output: Where the results lie.
        recipe: What is finetuned.
        backend: Of the engines.
        capability: Compute capability of the GPU.
    """

    def at(name: str) -> str:
        return str(output / name)

    small, large = str(MODEL), at("large/model")
    target = ("--target", backend)
    # For Turing, TensorRT for RTX builds where it is told to, and no products in float32.
    turing = backend == "tensorrt-rtx" and parse_capability(capability) == RTX_WHERE_ASKED
    floats = ("--dtype", "fp16") if turing else ()
    flavour = ("--backend", backend, *(("--compute-capability", capability) if turing else ()))
    build = (*flavour, "--max-batch", "1")
    return (
        Step(name="doctor", command=verb("doctor")),
        Step(
            name="quantize the bundled model",
            command=verb("finetune", small, "--recipe", str(recipe), "-o", at("checkpoint")),
            makes="checkpoint",
        ),
        Step(
            name="export it",
            command=verb("export", at("checkpoint"), *target, *floats, "-o", at("onnx")),
            makes="onnx",
            needs=("checkpoint",),
        ),
        Step(
            name="build its engines",
            command=verb("build-engine", at("onnx"), *flavour, "-o", at("engines")),
            makes="engines",
            needs=("onnx",),
        ),
        measured(RUNS, output, "engines"),
        Step(
            name="compare its engines with what lint promised",
            command=("-m", "scripts.gpu_measure", at("engines"), at("onnx")),
            needs=("engines", "onnx"),
        ),
        Step(
            name="parity of the engine rung",
            command=verb(
                "parity", small, at("engines"), "--via", at("checkpoint"), *SAMPLING, "--num-prompts", "4"
            )
            + ("-o", at("parity")),
            needs=("engines",),
        ),
        Step(
            name="parity of the engine rung, layer by layer",
            command=verb(
                "parity",
                small,
                at("engines"),
                "--via",
                at("checkpoint"),
                "--via",
                at("onnx"),
                "--debug-engines",
            )
            + (*SAMPLING, "--num-prompts", "2", "-o", at("parity-layers")),
            needs=("engines", "onnx"),
        ),
        Step(
            name="parity of torch on the GPU",
            command=verb("parity", small, at("checkpoint"), *SAMPLING, "--num-prompts", "4")
            + ("-o", at("parity-torch")),
            needs=("checkpoint",),
        ),
        Step(
            name="write a model of Stable Diffusion's size",
            command=("-m", "benchmarks.cpu_speed", "model", at("large")),
            makes="large/model",
        ),
        bench(
            output,
            "torch alone",
            *(f"large/model{way}" for way in ("", ":torch-fp16", ":torch-compile-fp16")),
        ),
        Step(
            name="export it in full precision",
            command=verb(
                "export", large, *target, "--mode", "none", "--dtype", "fp16", "-o", at("onnx-fp16")
            ),
            makes="onnx-fp16",
            needs=("large/model",),
            after=RUNS,
        ),
        Step(
            name="build its fp16 engines",
            command=verb("build-engine", at("onnx-fp16"), *build, "-o", at("engines-fp16")),
            makes="engines-fp16",
            needs=("onnx-fp16",),
        ),
        measured("run the fp16 engines, with CUDA graphs and without", output, "engines-fp16"),
        bench(
            output,
            "fp16 engines beside torch",
            "large/model",
            "large/model:torch-fp16",
            "engines-fp16",
            f"engines-fp16:{backend}-no-cuda-graphs",
        ),
        Step(
            name="quantize it on the GPU",
            command=verb("finetune", large, "--recipe", str(recipe), "--device", "cuda")
            + ("-o", at("checkpoint-large")),
            makes="checkpoint-large",
            needs=("large/model",),
        ),
        Step(
            name="export it quantized",
            command=verb("export", at("checkpoint-large"), *target, "--dtype", "fp16", "-o", at("onnx-int8")),
            makes="onnx-int8",
            needs=("checkpoint-large",),
            after=RUNS,
        ),
        Step(
            name="build its int8 engines",
            command=verb("build-engine", at("onnx-int8"), *build, "-o", at("engines-int8")),
            makes="engines-int8",
            needs=("onnx-int8",),
        ),
        measured("run the int8 engines, with CUDA graphs and without", output, "engines-int8"),
        bench(
            output,
            "fp16 and int8 engines beside torch",
            "large/model",
            "large/model:torch-fp16",
            "large/model:torch-compile-fp16",
            "engines-fp16",
            "engines-int8",
        ),
        Step(
            name="build the bundled model's engines without weights",
            command=verb("build-engine", at("onnx"), *flavour, "--strip-weights")
            + ("-o", at("engines-stripped")),
            makes="engines-stripped",
            needs=("onnx",),
        ),
        Step(
            name="put the weights in",
            command=verb("refit", at("engines-stripped"), at("onnx"), "-o", at("engines-refitted")),
            makes="engines-refitted",
            needs=("engines-stripped", "onnx"),
        ),
        measured("run the refitted engines, with CUDA graphs and without", output, "engines-refitted"),
        Step(
            name="build the large model's int8 engines with slower products in floats",
            command=verb("build-engine", at("onnx-int8"), *build, "--auto-fallback")
            + ("-o", at("engines-fallback")),
            makes="engines-fallback",
            needs=("onnx-int8",),
        ),
        bench(
            output,
            "int8 engines with slower products in floats",
            "engines-int8",
            "engines-fallback",
        ),
    )


def without_engines(planned: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that neither make nor read graphs or engines, nor what only those would need."""
    of_engines = ("onnx", "engines", "checkpoint-large")
    return tuple(
        step for step in planned if not any(name.startswith(of_engines) for name in (step.makes, *step.needs))
    )


def measured(name: str, output: Path, engines: str) -> Step:
    """Run engines with CUDA graphs and without."""
    return Step(name=name, command=("-m", "scripts.gpu_measure", str(output / engines)), needs=(engines,))


def bench(output: Path, name: str, *subjects: str) -> Step:
    """`quest-deploy bench` of subjects below `output`; one image at a time, loop and engines apart."""
    paths = [str(output / subject) for subject in subjects]
    options = ("--runs", "3", "--rounds", "1", "-o", str(output / f"bench-{name.replace(' ', '-')}"))
    needs = tuple(subject.partition(":")[0] for subject in subjects)
    return Step(name=f"bench: {name}", command=verb("bench", *paths, *SAMPLING, *options), needs=needs)
