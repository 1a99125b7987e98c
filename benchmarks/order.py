"""What a sample-pass costs here, and in a loop in the published order: one sample and one timestep at a time.

A pass is the gradient of one latent at one timestep in one guidance branch. Every loop trains the same layers of the
same network, in a process of its own, one after the other in turn; the least time of each is compared. In the published
order the network is run and differentiated for one sample, and after some samples there is an update (in phase 1 after
two, in phase 2 after four, for which the full-precision network is run first); phase 1 runs the whole network to see
the layers that carry time. Here an update has many timesteps, targets were recorded, and phase 1 runs those layers
alone. What the published code writes to disk and reads back between passes is left out.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import Table, number

if TYPE_CHECKING:
    from torch import Tensor

    from quest_deploy.config import PhaseConfig
    from quest_deploy.quantize.train import Task

NAME = "order"
RECIPE = "w4a8"
ORDERS = {
    "here": "quest-deploy",
    "here-shared": "quest-deploy, two processes of one thread (`accelerate launch`)",
    "published": "published order, and quantizers as published code writes them",
    "published-order": "published order, this project's quantizers",
    "update-a-pass": "the same with an update for every pass",
}
OWN = ("here", "here-shared")
SHARED = "here-shared"
REPETITIONS = 3
PROMPTS = 8
UPDATES, PASSES, WARM_UP = 4, 40, 3
# Samples for which the published code gathers gradients, and its passes for Stable Diffusion.
GATHERED = {"phase_1": 2, "phase_2": 4}
PUBLISHED_PASSES = {"phase_1": 7_700, "phase_2": 32_000}
GOAL = 5.0


def run(settings: Settings) -> dict[str, Any]:
    """Measure each loop, several times in turn."""
    found: dict[str, list[dict[str, Any]]] = {order: [] for order in ORDERS}
    for repetition in range(1 if settings.quick else REPETITIONS):
        for order, times in found.items():
            print(f"\n{order}, {repetition + 1}", flush=True)
            times.append(_processes(order, quick=settings.quick))
    rows = {order: _least(times) for order, times in found.items()}
    return {**header(settings), "recipe": RECIPE, "rows": rows, "ratios": ratios(rows)}


def _processes(order: str, *, quick: bool) -> dict[str, Any]:
    """Figures of a loop in a process of its own; or in two that share updates, as `accelerate launch` starts them."""
    command = [sys.executable, "-m", "benchmarks.order", order, "quick" if quick else "full"]
    if order != SHARED:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return {**found[0], "peak_memory_bytes": sum(one["peak_memory_bytes"] for one in found)}


def _least(times: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "phase_1_ms": min(one["phase_1_ms"] for one in times),
        "phase_2_ms": min(one["phase_2_ms"] for one in times),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in times),
        "torch_threads": times[0]["torch_threads"],
        "repetitions": len(times),
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as long each other loop takes: by phase, and for the published passes of both."""
    here = rows["here"]
    result = {}
    for order, row in rows.items():
        if order != "here":
            result[order] = {
                "phase_1": round(row["phase_1_ms"] / here["phase_1_ms"], 2),
                "phase_2": round(row["phase_2_ms"] / here["phase_2_ms"], 2),
                "both": round(_both(row) / _both(here), 2),
            }
    return result


def _both(row: dict[str, Any]) -> float:
    return float(sum(count * row[f"{phase}_ms"] for phase, count in PUBLISHED_PASSES.items()))


def worker(order: str, *, quick: bool) -> dict[str, Any]:
    """Measure one loop in this process."""
    import resource

    import torch

    from quest_deploy.quantize import learned, train

    if order == "published":
        learned.fake_quantize, learned.weight = plain_input, plain_weight
    task, phases = _task(quick=quick)
    cost: dict[str, Any] = {}
    for name, phase in phases.items():
        temporal = name == "phase_1"
        groups = train.trainable(task.student, phase, task.trace.roles, temporal=temporal)
        if order in OWN:
            optimizer = train.make_optimizer(groups)
            cost[f"{name}_ms"] = _here(task, phase, optimizer, temporal=temporal, quick=quick)
        else:
            optimizer = torch.optim.Adam(groups, lr=1.0)
            gathered = 1 if order == "update-a-pass" else GATHERED[name]
            cost[f"{name}_ms"] = _published(task, optimizer, gathered, temporal=temporal, quick=quick)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**cost, "peak_memory_bytes": peak, "torch_threads": torch.get_num_threads()}


def _task(*, quick: bool) -> tuple[Task, dict[str, PhaseConfig]]:
    """A student at the start of finetuning, on a few recorded prompts."""
    import dataclasses

    from quest_deploy.config import FinetuneConfig
    from quest_deploy.prompts import load_prompts
    from quest_deploy.quantize import calibrate
    from quest_deploy.quantize.finetune import prepare
    from quest_deploy.quantize.insert import quantizable_layers
    from quest_deploy.quantize.layers import TimestepContext
    from quest_deploy.quantize.parallel import find_workers
    from quest_deploy.quantize.parts import initialize_one, layer_inputs
    from quest_deploy.quantize.phases import Inputs, make_task
    from quest_deploy.quantize.recipe import load_recipe
    from quest_deploy.quantize.select import layer_bits
    from quest_deploy.quantize.student import make_student

    recipe = dataclasses.replace(load_recipe(RECIPE), calibration_prompts=PROMPTS, validation_prompts=1)
    if quick:
        recipe = dataclasses.replace(recipe, calibration_steps=6, calibration_prompts=2)
    config = FinetuneConfig(recipe=recipe, prompts=load_prompts(default="calibration"))
    model, trace, config = prepare(MODEL, config)
    data = calibrate.record_trajectories(
        model,
        config.prompts[: recipe.calibration_prompts],
        steps=recipe.calibration_steps,
        guidance_scale=recipe.guidance_scale,
        seed=0,
        batch_size=PROMPTS,
    )
    inputs = layer_inputs(model, trace, data, seed=0, prompts_per_step=1, positions=16)
    layers, bits = quantizable_layers(model.denoiser), layer_bits(trace.roles, recipe)
    qparams = {name: initialize_one(layers[name], inputs[name], bits[name], recipe) for name in inputs}
    context = TimestepContext(data.boundaries())
    student = make_student(model, qparams, {}, context)
    student.requires_grad_(False)
    task = make_task(
        Inputs(
            model=model,
            student=student,
            trace=trace,
            data=data,
            context=context,
            config=config,
            workers=find_workers("cpu"),
        )
    )
    return task, {"phase_1": recipe.temporal, "phase_2": recipe.sensitive}


def _here(task: Task, phase: PhaseConfig, optimizer: Any, *, temporal: bool, quick: bool) -> float:
    """Milliseconds a pass in this project's loop."""
    from quest_deploy.quantize.train import TIMESTEPS_PER_LOCAL_BATCH, _backpropagate, learned

    def update(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = _backpropagate(task, phase, step, temporal=temporal)
        task.workers.sum_gradients(parameters, loss)
        optimizer.step()

    parameters = list(learned(optimizer.param_groups).values())
    branches = task.data.targets.shape[2]
    network = (phase.batch_size + phase.walks * task.objective.walk_length) * branches
    # Whole periods of the updates that see the network's output.
    updates = phase.network_every * (1 if quick else UPDATES)
    passes = network * updates // phase.network_every
    if temporal:
        passes += TIMESTEPS_PER_LOCAL_BATCH * updates
    return 1000 * _seconds(update, 0 if quick else 1, updates) / passes


def _published(task: Task, optimizer: Any, gathered: int, *, temporal: bool, quick: bool) -> float:
    """Milliseconds a pass in the published order, with an update for every `gathered` passes."""
    import torch

    from quest_deploy.model.components import predict

    ends = task.trace.ends if temporal else ()
    generator = torch.Generator().manual_seed(0)
    known: list[list[Any]] = []

    def update(index: int) -> None:
        # The published loop goes through the timesteps from the first to the last.
        step = torch.full((gathered,), index % task.data.timesteps.numel())
        prompt = torch.randint(task.data.num_prompts, (gathered,), generator=generator)
        sample, timestep, conditioning = task.data.inputs(prompt, step)
        sample, timestep = sample[:gathered], timestep[:gathered]
        conditioning = {name: value[:gathered] for name, value in conditioning.items()}
        # Phase 1 stays with the same samples of a timestep for hundreds of updates: their targets cost nothing.
        if not temporal or not known:
            with torch.no_grad(), _outputs(task.teacher, ends) as wanted:
                known[:] = [[predict(task.teacher, sample, timestep, conditioning)], wanted]
        optimizer.zero_grad(set_to_none=True)
        target, wanted = known[0][0], known[1]
        for one in range(gathered):
            own = slice(one, one + 1)
            told = {name: value[own] for name, value in conditioning.items()}
            with _outputs(task.student, ends) as seen:
                output = predict(task.student, sample[own], timestep[own], told)
            loss = (output - target[own]).square().mean()
            for got, right in zip(seen, wanted, strict=True):
                loss = loss + (got - right[own]).square().mean()
            (loss / gathered).backward()
        optimizer.step()

    updates = 2 if quick else PASSES // gathered
    return 1000 * _seconds(update, 0 if quick else WARM_UP, updates) / (updates * gathered)


def plain_input(
    x: Tensor, group_scale: Tensor, group: Tensor, inverse_row: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """An activation quantizer as the published code writes one: every operation differentiated by itself."""
    own = group_scale if group_scale.numel() == 1 else group_scale[group]
    own = own.reshape(-1, *[1] * (x.ndim - 1))
    x = x if inverse_row is None else x * inverse_row
    return _plain(x, own, qmin, qmax)


def plain_weight(value: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The same for a weight, one scale for each output channel."""
    return _plain(value, scale.reshape(-1, *[1] * (value.ndim - 1)), qmin, qmax)


def _plain(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    steps = x / scale
    rounded = steps + (steps.round() - steps).detach()
    # Codes from 0 with a zero-point, as asymmetric quantizers have them.
    codes = (rounded - qmin).clamp(0, qmax - qmin)
    return (codes + qmin) * scale


class _outputs:
    """Collects the outputs of some layers while the body runs."""

    def __init__(self, module: Any, names: tuple[str, ...]) -> None:
        self.seen: list[Any] = []
        self.handles = [
            module.get_submodule(name).register_forward_hook(
                lambda layer, args, output: self.seen.append(output)
            )
            for name in names
        ]

    def __enter__(self) -> list[Any]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _seconds(update: Callable[[int], None], warm_up: int, count: int) -> float:
    for step in range(warm_up):
        update(step)
    started = time.perf_counter()
    for step in range(count):
        update(step)
    return time.perf_counter() - started


def tables(result: dict[str, Any]) -> list[Table]:
    """Ratios only: times of one run on one machine."""
    rows = []
    for order, label in ORDERS.items():
        ratio = result["ratios"].get(order, {"phase_1": 1.0, "phase_2": 1.0, "both": 1.0})
        memory = result["rows"][order]["peak_memory_bytes"]
        rows.append(
            (
                label,
                *(number(ratio[key]) for key in ("phase_1", "phase_2", "both")),
                f"{memory / 1e6:,.0f} MB",
            )
        )
    threads = result["rows"]["here"]["torch_threads"]
    passes = " and ".join(f"{count:,}" for count in PUBLISHED_PASSES.values())
    return [
        Table(
            title="Seconds of a sample-pass, relative to quest-deploy's",
            columns=("loop", "phase 1", "phase 2", "both", "peak memory of the process"),
            rows=tuple(rows),
            labels=1,
            note=f"{result['recipe'].upper()}; {threads} thread(s) in all; least of "
            f"{result['rows']['here']['repetitions']}. A pass is the gradient of one latent at one timestep in one "
            "branch; in phase 1, of the loss of the layers that carry time at one timestep. In the published order "
            "network, gradient and loss are of one sample at a time, with an update after two (phase 1) or four; here "
            "an update has pairs, walks and, in phase 1, 256 timesteps of those layers alone. Both: passes "
            f"published for Stable Diffusion, {passes}. Network, layers that learn and targets are the same; what the "
            "published code writes to disk and reads is left out.",
        )
    ]


if __name__ == "__main__":
    print(json.dumps(worker(sys.argv[1], quick=sys.argv[2:] == ["quick"])))
