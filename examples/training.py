"""A training loop that may be interrupted at any step and goes on from there; nothing is pickled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 20.0
REPORT_EVERY_SECONDS = 10.0
CLIP_NORM = 1.0


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


def train(module: nn.Module, loss: Callable[[torch.Generator], Tensor], plan: Plan, name: str) -> bool:
    """Train `module` and leave the averaged weights in it.

    Args:
        module: Its parameters learn.
        loss: A scalar from a batch drawn with the given generator.
        plan: How long, how fast.
        name: For progress.

    Returns:
        Whether all steps were made; if not, the same call goes on.
    """
    parameters = dict(module.named_parameters())
    averaged = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=plan.betas
    )
    step = restore(plan.state, parameters, averaged, optimizer)
    module.train()
    losses: list[float] = []
    saved = reported = time.monotonic()
    while step < plan.steps and time.monotonic() < plan.deadline:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate(step, plan.steps)
        optimizer.zero_grad(set_to_none=True)
        value = loss(torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        optimizer.step()
        step += 1
        losses.append(float(value.detach()))
        with torch.no_grad():
            # A young average forgets faster: otherwise it would remember the random start.
            decay = min(plan.average, step / (step + 10))
            for key, parameter in parameters.items():
                averaged[key].lerp_(parameter, 1 - decay)
        now = time.monotonic()
        if now - saved > SAVE_EVERY_SECONDS:
            save(plan.state, parameters, averaged, optimizer, step)
            saved = now
        if now - reported > REPORT_EVERY_SECONDS or step == plan.steps:
            print(f"{name}: step {step} of {plan.steps}, loss {sum(losses) / len(losses):.4f}", flush=True)
            losses, reported = [], now
    save(plan.state, parameters, averaged, optimizer, step)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(averaged[key])
    module.eval()
    return step >= plan.steps


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a warm-up over 2 % of the steps, then a cosine to zero."""
    warm = max(1, steps // 50)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
    step: int,
) -> None:
    """Write the state to a temporary file and rename it, so that a killed run leaves the previous one."""
    tensors = {f"average/{key}": value for key, value in averaged.items()}
    for key, parameter in parameters.items():
        tensors[f"now/{key}"] = parameter.detach()
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}/{key}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial, {"step": str(step)})
    partial.replace(path)


def restore(
    path: Path, parameters: dict[str, nn.Parameter], averaged: dict[str, Tensor], optimizer: torch.optim.AdamW
) -> int:
    """Put a saved state in place, if there is one; the number of steps it has."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118
            kind, _, key = name.partition("/")
            value = file.get_tensor(name)
            if kind == "now":
                parameters[key].copy_(value)
            elif kind == "average":
                averaged[key].copy_(value)
            else:
                optimizer.state[parameters[key]][kind] = value
        step = int(file.metadata()["step"])
    print(f"{path}: going on from step {step}", flush=True)
    return step
