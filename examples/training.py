"""A training loop that may be interrupted at any step and goes on from there; nothing is pickled."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 20.0
REPORT_EVERY_SECONDS = 10.0
CLIP_NORM = 1.0
RECORDS = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one module is trained.

    Attributes:
        state: File that keeps everything an interrupted run needs.
        steps: Updates in all.
        deadline: `time.monotonic` at which to stop, finished or not.
        learning_rate: Peak, after a short warm-up; falls to zero as a cosine.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        average: Decay of the exponential moving average of the weights, which is the result.
        seed: Step `i` draws from a generator of its own, so that a resumed run sees what it would have seen.
    """

    state: Path
    steps: int
    deadline: float
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    average: float = 0.995
    seed: int = 0

    def curve(self) -> dict[str, float]:
        """What decides every update: a run that goes on must have the same."""
        return {
            "steps": self.steps,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "average": self.average,
        }


@dataclass
class History:
    """What was seen of a training, over all of its runs.

    Attributes:
        step: Updates made.
        seconds: Spent on them.
        losses: (step, mean loss since the entry before), `RECORDS` of them in a whole training.
        pending: Losses since the last entry.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)

    def add(self, loss: float, every: int) -> None:
        """One more update."""
        self.step += 1
        self.pending.append(loss)
        if self.step % every == 0:
            self.losses.append((self.step, round(sum(self.pending) / len(self.pending), 4)))
            self.pending = []

    def record(self, steps: int) -> dict[str, Any]:
        """For a JSON file."""
        losses = {str(step): loss for step, loss in self.losses}
        return {"steps": self.step, "of": steps, "seconds": round(self.seconds), "losses": losses}


def machine() -> dict[str, Any]:
    """What a training ran on, for a record of it."""
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def state_beside(output: Path, name: str) -> Path:
    """Where what an interrupted training needs is kept: `.OUTPUT.NAME`, beside the output.

    Raises:
        SystemExit: the output is a file, which would be told after hours of training.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise SystemExit(f"{output} is a file; give a directory, or one that does not exist yet")
    return output.with_name(f".{output.name}.{name}")


def train(module: nn.Module, loss: Callable[[torch.Generator], Tensor], plan: Plan, name: str) -> History:
    """Train `module` and leave the averaged weights in it.

    Args:
        module: Its parameters learn.
        loss: A scalar from a batch drawn with the given generator.
        plan: How long, how fast.
        name: What is trained; a state goes on under its own name alone.

    Returns:
        What was seen; if its steps are not all of the plan's, the same call goes on.

    Raises:
        SystemExit: there is nothing to do, or the state is that of something else.
    """
    if plan.steps < 1:
        raise SystemExit(f"{name}: got {plan.steps} steps, expected 1 or more")
    parameters = dict(module.named_parameters())
    averaged = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=plan.betas
    )
    history = restore(plan, name, parameters, averaged, optimizer)
    every = max(1, plan.steps // RECORDS)
    module.train()
    losses: list[float] = []
    counted = saved = reported = time.monotonic()
    while history.step < plan.steps and time.monotonic() < plan.deadline:
        step = history.step
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate(step, plan.steps)
        optimizer.zero_grad(set_to_none=True)
        value = loss(torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        optimizer.step()
        losses.append(float(value.detach()))
        history.add(losses[-1], every)
        with torch.no_grad():
            # A young average forgets faster: otherwise it would remember the random start.
            decay = min(plan.average, history.step / (history.step + 10))
            for key, parameter in parameters.items():
                averaged[key].lerp_(parameter, 1 - decay)
        now = time.monotonic()
        history.seconds, counted = history.seconds + now - counted, now
        if now - saved > SAVE_EVERY_SECONDS:
            save(plan, name, parameters, averaged, optimizer, history)
            saved = now
        if now - reported > REPORT_EVERY_SECONDS or history.step == plan.steps:
            mean = sum(losses) / len(losses)
            print(f"{name}: step {history.step} of {plan.steps}, loss {mean:.4f}", flush=True)
            losses, reported = [], now
    if history.step:
        save(plan, name, parameters, averaged, optimizer, history)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(averaged[key])
    module.eval()
    return history


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a warm-up over 2 % of the steps, then a cosine to zero."""
    warm = max(1, steps // 50)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(
    plan: Plan,
    name: str,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
    history: History,
) -> None:
    """Write the state to a temporary file and rename it, so that a killed run leaves the previous one."""
    tensors = {f"average/{key}": value for key, value in averaged.items()}
    for key, parameter in parameters.items():
        tensors[f"now/{key}"] = parameter.detach()
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}/{key}"] = value
    path = plan.state
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        partial,
        {"name": name, "history": json.dumps(asdict(history)), "plan": json.dumps(plan.curve())},
    )
    partial.replace(path)


def restore(
    plan: Plan,
    name: str,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
) -> History:
    """Put a saved state in place, if there is one, and tell how it came about.

    Raises:
        SystemExit: it is that of something else, or of another plan: what goes on would be neither.
    """
    path = plan.state
    if not path.is_file():
        return History()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        of = file.metadata().get("name", name)
        if of != name:
            raise SystemExit(
                f"{path} is the state of {of}, expected {name}; give another output, or delete that file"
            )
        before = json.loads(file.metadata().get("plan", "{}"))
        other = [
            f"{key} {before[key]}" for key, value in plan.curve().items() if before.get(key, value) != value
        ]
        if other:
            raise SystemExit(
                f"{path} is of a run with {', '.join(other)}; give the same, another output, or delete that file"
            )
        for entry in file.keys():  # noqa: SIM118
            kind, _, key = entry.partition("/")
            value = file.get_tensor(entry)
            if kind == "now":
                parameters[key].copy_(value)
            elif kind == "average":
                averaged[key].copy_(value)
            else:
                optimizer.state[parameters[key]][kind] = value
        told = json.loads(file.metadata()["history"])
    history = History(**told | {"losses": [(step, loss) for step, loss in told["losses"]]})
    print(f"{path}: going on from step {history.step}", flush=True)
    return history
