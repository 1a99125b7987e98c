"""`quest-deploy doctor`: what this machine can finetune, export, build and run, found out by trying."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import TYPE_CHECKING, Any

import click

from quest_deploy.commands.verb import Result, format_size, format_table, verb
from quest_deploy.manifest import core_count

if TYPE_CHECKING:
    from quest_deploy.engines.libraries import Gpu

# Import name -> what the package is for; in the order of the path from a model to an image.
PACKAGES = {
    "torch": "finetune, export, generate --backend torch",
    "diffusers": "models and schedulers",
    "transformers": "text encoders",
    "safetensors": "weights",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "generate --backend onnxruntime, parity",
    "openvino": "generate --backend openvino",
    "polygraphy": "build-engine",
    "tensorrt_rtx": "build-engine and generate --backend tensorrt-rtx",
    "tensorrt": "build-engine and generate --backend tensorrt",
}
PROBE_SECONDS = 60
PROBES_AT_ONCE = 4

# A fresh interpreter, so that a broken library can do no more than fail: import it and make a builder.
_TENSORRT_PROBE = """
import sys, importlib
trt = importlib.import_module(sys.argv[1])
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
builder.create_network(0)
"""
_PACKAGE_PROBE = """
import sys, importlib
module = importlib.import_module(sys.argv[1])
if sys.argv[1] == "onnxruntime":
    print(",".join(module.get_available_providers()))
elif sys.argv[1] == "torch":
    print(module.cuda.get_device_name() if module.cuda.is_available() else "")
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed or missing library. `problem` is empty where it can be imported."""

    name: str
    version: str | None
    purpose: str
    problem: str = ""
    note: str = ""

    @property
    def usable(self) -> bool:
        return self.version is not None and not self.problem


@dataclass(frozen=True, kw_only=True)
class Ability:
    """One thing that this machine can or cannot do, and why."""

    name: str
    possible: bool
    sentence: str


@click.command(short_help="What this machine can build and run.")
@click.option(
    "--compute-capability",
    metavar="X.Y",
    help="Say what recipes mean on such a GPU.  [default: this machine's]",
)
@verb()
def doctor(*, compute_capability: str | None) -> Result:
    """Say which libraries and GPU were found, and what this machine can finetune, export, build and run.

    For the GPU found, or one of another compute capability, also what each recipe means there: which arithmetic its
    numbers meet in, and which recipe has the same.
    """
    from quest_deploy import __version__
    from quest_deploy.engines.libraries import driver_version

    recipes = explain_recipes(compute_capability)
    packages = find_packages()
    gpus, driver_problem = find_gpus()
    abilities = find_abilities(packages, gpus, driver_problem)
    machine = describe_machine()
    data = {
        "quest_deploy": __version__,
        "machine": machine,
        "gpus": [asdict(gpu) for gpu in gpus],
        "driver": driver_version(),
        "driver_problem": driver_problem,
        "packages": {
            name: asdict(package) | {"usable": package.usable} for name, package in packages.items()
        },
        "abilities": [asdict(ability) for ability in abilities],
        "recipes": recipes,
    }
    return Result(data=data, text=render(data))


def explain_recipes(compute_capability: str | None) -> dict[str, dict[str, Any]]:
    """What each recipe means, by compute capability: the one given, or those of this machine's GPUs.

    Raises:
        ConfigError: what was given is no compute capability.
    """
    from quest_deploy.engines.arithmetic import meanings, parse_capability, remarks
    from quest_deploy.engines.libraries import gpus

    wanted = (
        [gpu.compute_capability for gpu in gpus()] if compute_capability is None else [compute_capability]
    )
    parsed = {text.strip(): parse_capability(text) for text in wanted}
    return {
        text: {"recipes": [asdict(one) for one in meanings(capability)], "remarks": remarks(capability)}
        for text, capability in parsed.items()
    }


def describe_machine() -> dict[str, Any]:
    """Interpreter, system, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": core_count(),
        "memory_bytes": memory,
    }


def run_probe(code: str, *arguments: str) -> tuple[str, str]:
    """Run `code` in a fresh interpreter: what it printed, and what went wrong (one line, empty if nothing)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            # No module of the user's working directory may shadow a library's.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    except subprocess.TimeoutExpired:
        return "", f"gave no answer within {PROBE_SECONDS} s"
    if done.returncode == 0:
        return (done.stdout.strip().splitlines() or [""])[-1], ""
    last_line = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    return "", last_line


def find_packages() -> dict[str, Package]:
    """Every library by its import name; they are tried at the same time, since an import takes seconds."""
    known = packages_distributions()
    with ThreadPoolExecutor(min(core_count(), PROBES_AT_ONCE)) as pool:
        found = pool.map(lambda name: probe_package(name, known.get(name, [])), PACKAGES)
        return dict(zip(PACKAGES, found, strict=True))


def probe_package(name: str, distributions: Sequence[str]) -> Package:
    """Find a library's version and whether it works.

    Args:
        name: It is imported as.
        distributions: Installed ones that bring it.
    """
    found: str | None = None
    for distribution in distributions:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        # The stubs alone install a `tensorrt` directory that holds no library.
        if not distribution.endswith("-stubs"):
            break
    else:
        found = None
    if found is None:
        return Package(name=name, version=None, purpose=PACKAGES[name])
    note, problem = run_probe(_TENSORRT_PROBE if name.startswith("tensorrt") else _PACKAGE_PROBE, name)
    return Package(name=name, version=found, purpose=PACKAGES[name], problem=problem, note=note)


def find_gpus() -> tuple[list[Gpu], str]:
    """The NVIDIA GPUs, and why there is none that a program can use (empty if there is one).

    The driver itself is asked: a GPU that only nvidia-smi sees runs nothing.
    """
    from quest_deploy.engines.libraries import gpus

    found = gpus()
    if found:
        return found, ""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "no NVIDIA driver"
    return [], "an NVIDIA driver but no GPU that it can use"


def find_abilities(packages: dict[str, Package], gpus: Sequence[Gpu], driver_problem: str) -> list[Ability]:
    """What can be done with these libraries, this driver and the first of these GPUs, which runs engines."""
    from quest_deploy.engines.libraries import age_of

    torch = packages["torch"]
    old = {name: age_of(name, packages[name].version or "") for name in ("onnxruntime", "openvino")}
    model_missing = _missing(packages, "torch", "diffusers", "transformers", "safetensors")
    where = f"on {torch.note}" if torch.note else "on the CPU; large models take long there"
    abilities = [
        _ability("finetune", model_missing, f"torch {torch.version}, {where}"),
        _ability("generate --backend torch", model_missing, f"torch {torch.version}, {where}"),
        _ability(
            "export",
            model_missing or _missing(packages, "onnx", "onnxscript"),
            f"onnx {packages['onnx'].version}, no GPU needed",
        ),
        _ability(
            "generate --backend onnxruntime",
            _missing(packages, "onnxruntime"),
            f"onnxruntime {packages['onnxruntime'].version} with {packages['onnxruntime'].note}{old['onnxruntime']}",
        ),
        _ability(
            "generate --backend openvino",
            _missing(packages, "openvino")
            + ("" if packages["openvino"].version else "; pip install 'quest-deploy[openvino]'"),
            f"openvino {packages['openvino'].version} on the CPU{old['openvino']}",
        ),
    ]
    gpu = gpus[0] if gpus else None
    abilities += _with_tensorrt_rtx(packages, gpu, driver_problem)
    abilities += _with_tensorrt(packages, gpu, driver_problem)
    return abilities


def _with_tensorrt_rtx(packages: dict[str, Package], gpu: Gpu | None, driver_problem: str) -> list[Ability]:
    from quest_deploy.engines.arithmetic import RTX_WHERE_ASKED, parse_capability, rtx_runs

    found, missing = _tensorrt(packages, "tensorrt_rtx")
    builds, runs, problem = "", "", driver_problem
    if gpu is not None:
        capability = gpu.compute_capability
        if not rtx_runs(parse_capability(capability)):
            problem = f"it does not support {gpu.name}, of compute capability {capability}"
            builds = f", for other GPUs alone: {problem}"
        elif parse_capability(capability) == RTX_WHERE_ASKED:
            builds = f"; for this GPU only with --compute-capability {capability}"
            runs = f" that were built with --compute-capability {capability}"
    problem = problem or _without_cuda(packages)
    return [
        _ability("build-engine --backend tensorrt-rtx", missing, f"{found} can build engines here{builds}"),
        _ability(
            "generate --backend tensorrt-rtx",
            missing or (problem and f"{found} cannot run engines here: {problem}"),
            f"{found} can run engines here{runs}",
        ),
    ]


def _with_tensorrt(packages: dict[str, Package], gpu: Gpu | None, driver_problem: str) -> list[Ability]:
    from quest_deploy.engines.arithmetic import TENSORRT_FROM, parse_capability

    found, missing = _tensorrt(packages, "tensorrt")
    problem = driver_problem
    if gpu is not None and parse_capability(gpu.compute_capability) < TENSORRT_FROM:
        least = ".".join(map(str, TENSORRT_FROM))
        problem = f"{gpu.name} has compute capability {gpu.compute_capability}, it wants {least} or later"
    run_problem = problem or _without_cuda(packages)
    return [
        _ability(
            "build-engine --backend tensorrt",
            missing or (problem and f"{found}: {problem}"),
            f"{found} can build engines here",
        ),
        _ability(
            "generate --backend tensorrt",
            missing or (run_problem and f"{found} cannot run engines here: {run_problem}"),
            f"{found} can run engines here",
        ),
    ]


def _tensorrt(packages: dict[str, Package], name: str) -> tuple[str, str]:
    """A flavour's title and version, and why it cannot be used; empty if it can."""
    from quest_deploy.engines.libraries import title_of

    backend = name.replace("_", "-")
    missing = _missing(packages, name, "polygraphy")
    if packages[name].version is None:
        missing += f"; pip install 'quest-deploy[{backend}]'"
    return f"{title_of(backend)} {packages[name].version}", missing


def _without_cuda(packages: dict[str, Package]) -> str:
    """Why torch, in whose memory engines run, cannot use the GPU; empty if it can."""
    from quest_deploy.engines.libraries import without_cuda

    torch = packages["torch"]
    return _missing(packages, "torch") or ("" if torch.note else without_cuda(str(torch.version)))


def _missing(packages: dict[str, Package], *names: str) -> str:
    """Why these packages cannot be used together; empty if they can."""
    reasons = []
    for name in names:
        if packages[name].version is None:
            reasons.append(f"{name} is not installed")
        elif packages[name].problem:
            reasons.append(f"{name} {packages[name].version} does not work: {packages[name].problem}")
    return "; ".join(reasons)


def _ability(name: str, problem: str, success: str) -> Ability:
    return Ability(name=name, possible=not problem, sentence=problem or success)


def render(data: dict[str, Any]) -> str:
    """The findings as text."""
    machine = data["machine"]
    rows = [
        (
            name,
            package["version"] or "-",
            package["problem"] or package["note"] if package["version"] else "not installed",
        )
        for name, package in data["packages"].items()
    ]
    abilities = [
        ("yes" if ability["possible"] else "no", ability["name"], ability["sentence"])
        for ability in data["abilities"]
    ]
    return "\n".join(
        [
            f"quest-deploy {data['quest_deploy']}, Python {machine['python']}, {machine['system']}, "
            f"{machine['cores']} cores, {format_size(machine['memory_bytes'])} memory",
            f"GPU: {render_gpus(data['gpus'], data['driver']) or data['driver_problem']}",
            "",
            format_table(rows),
            "",
            "This machine can:",
            format_table(abilities),
            "",
            render_recipes(data["recipes"]),
        ]
    )


def render_gpus(gpus: list[dict[str, Any]], driver: str) -> str:
    """Names, compute capabilities and memory, as text; empty where there is none."""
    shown = [
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, {format_size(gpu['memory_bytes'])})"
        for gpu in gpus
    ]
    return ", ".join([*shown, f"driver {driver}"] if shown and driver else shown)


def render_recipes(explained: dict[str, dict[str, Any]]) -> str:
    """What recipes mean, as text: a paragraph each, since their sentences are long."""
    if not explained:
        return "What recipes mean on a GPU: `quest-deploy doctor --compute-capability 8.9`, for example."
    lines = []
    for capability, found in explained.items():
        lines.append(f"On a GPU of compute capability {capability}:")
        for one in found["recipes"]:
            same = "" if one["nearest"] == one["recipe"] else f" (nearest: {one['nearest']})"
            lines.append(f"  {one['recipe']}: {one['sentence']}{same}")
        lines += [f"  - {remark}" for remark in found["remarks"]]
    return "\n".join(lines)
