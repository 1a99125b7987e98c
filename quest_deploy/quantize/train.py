"""The two phases as one loop: mixed timesteps in every batch, state that can be saved at any step.

The published code runs one sample and one timestep at a time. Here every update takes many timesteps of one trajectory,
which is possible because scales are gathered per sample by timestep group; and the temporal phase's own loss runs over
all timesteps without the rest of the network, since that path depends on the timestep (and a class) alone.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.config import PhaseConfig, Precision
from quest_deploy.quantize import learned as learned_weights
from quest_deploy.quantize import losses
from quest_deploy.quantize.attention import operand_quantizers
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import Role, quantized_layers
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext
from quest_deploy.quantize.losses import Objective
from quest_deploy.quantize.parallel import ALONE, Workers
from quest_deploy.quantize.select import select
from quest_deploy.quantize.tables import time_tables
from quest_deploy.quantize.trace import Trace

logger = logging.getLogger(__name__)

VALIDATIONS_PER_PHASE = 8
TIMESTEPS_PER_LOCAL_BATCH = 256
SEEDS = 1 << 63
NORMS = (nn.GroupNorm, nn.LayerNorm)


@dataclass
class TrainState:
    """Where a phase stands; everything that resuming needs.

    Attributes:
        step: Updates done.
        best_loss: Least validation loss so far.
        best: The learned tensors that gave it, by name.
        losses: (step, validation loss).
        broken_at: The update whose loss was not finite, at which the phase ended; None where there was none.
    """

    step: int = 0
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    broken_at: int | None = None


def trainable(
    denoiser: nn.Module, phase: PhaseConfig, roles: Mapping[str, Role], *, temporal: bool
) -> list[dict[str, object]]:
    """Adam's parameter groups of one phase; everything else is left alone.

    Args:
        denoiser: With quantized layers.
        phase: The phase.
        roles: The part that each layer plays.
        temporal: Whether this is phase 1, which learns the temporal layers' activation scales instead of all others'.
    """
    layers = quantized_layers(denoiser)
    chosen = select(roles, phase.layers)
    groups: list[dict[str, object]] = []
    generator = torch.Generator().manual_seed(0)
    known: set[int] = set()

    def add(name: str, parameter: Tensor | None, rate: float) -> None:
        # Layers that read one tensor share their quantizer.
        if parameter is not None and rate > 0 and id(parameter) not in known:
            known.add(id(parameter))
            parameter.requires_grad_(True)
            groups.append({"params": [parameter], "lr": rate, "base_lr": rate, "name": name})

    denoiser.requires_grad_(False)
    for name, layer in layers.items():
        if name in chosen:
            step = float(layer.weight_scale().detach().mean())
            row = layer.row()
            # The float weight is divided by the row, hence so is its grid step.
            step = step if row is None else step / float(row.log().mean().exp())
            if phase.low_rank is None:
                add(f"{name}.weight", layer.weight, phase.learning_rate_weights * step)
            else:
                layer.add_low_rank(phase.low_rank, generator)
                # So that entries of the product move as far in an update as those of a weight would.
                add(f"{name}.low_rank_b", layer.low_rank_b, phase.learning_rate_weights * step)
                add(f"{name}.low_rank_a", layer.low_rank_a, phase.learning_rate_weights / phase.low_rank**0.5)
            add(f"{name}.weight_log_scale", layer.weight_log_scale, phase.learning_rate_scales / 4)
        if layer.quantizer is not None and (roles[name] == "temporal") == temporal:
            add(f"{name}.quantizer.log_scale", layer.quantizer.log_scale, phase.learning_rate_scales)
        if (roles[name] == "temporal") == temporal:
            add(f"{name}.bias", layer.bias, phase.learning_rate_floats)
    if temporal:
        for name, module in time_tables(denoiser).items():
            size = float(module.table.detach().square().mean().sqrt())
            add(f"{name}.table", module.table, phase.learning_rate_scales * size)
    else:
        for name, quantizer in operand_quantizers(denoiser).items():
            add(f"{name}.log_scale", quantizer.log_scale, phase.learning_rate_scales)
        for name, parameter in norm_parameters(denoiser).items():
            add(name, parameter, phase.learning_rate_floats)
    return groups


def norm_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of the norms that have any, by name, in module order."""
    return {
        f"{name}.{which}": parameter
        for name, module in denoiser.named_modules()
        # By name: diffusers has an RMSNorm of its own beside torch's.
        if isinstance(module, NORMS) or type(module).__name__ == "RMSNorm"
        for which, parameter in module.named_parameters(recurse=False)
    }


@dataclass(frozen=True)
class Task:
    """What one phase works on.

    Attributes:
        student: Denoiser with quantized layers.
        teacher: The full-precision denoiser (its temporal layers are the local targets of phase 1).
        trace: Which layers of either carry time, and how their outputs follow from it.
        data: Recorded trajectories.
        training: int64, prompts that are trained on.
        own: int64, where in `data` the student's own trajectories lie; None where there are none.
        validation: int64, prompts that choose the result.
        objective: How errors are weighed.
        context: The student's timestep groups.
        seed: For the order of samples.
        last_time: The largest timestep of the noise schedule, as the denoiser is told it.
        precision: Of the float operations; grids are float32 in any case.
        workers: The processes that share every update.
    """

    student: nn.Module
    teacher: nn.Module
    trace: Trace
    data: CalibrationSet
    training: Tensor
    validation: Tensor
    objective: Objective
    context: TimestepContext
    seed: int
    last_time: float
    own: Tensor | None = None
    precision: Precision = "float32"
    workers: Workers = ALONE

    def validation_loss(self) -> float:
        """The mean of errors, relative to those of rounding alone: 1 is the start."""
        mine = self.validation[self.workers.index :: self.workers.count]
        layers = quantized_layers(self.student).values()
        with (
            torch.no_grad(),
            # As in an update, weights are quantized before anything is rounded: autocast would round B A.
            learned_weights.quantized_once(layers),
            autocast(self.data.device, self.precision),
        ):
            total = losses.total_loss(self.student, self.data, mine, self.objective)
        return self.objective.mean(self.workers.sum(total) / self.validation.numel())


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Float operations in `precision` while the body runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def learned(groups: list[dict[str, object]]) -> dict[str, Tensor]:
    """The tensors of Adam's parameter groups, by name."""
    return {str(group["name"]): group["params"][0] for group in groups}  # type: ignore[index]


def make_optimizer(groups: list[dict[str, object]]) -> torch.optim.Adam:
    """Adam over `trainable(...)`; on the CPU in one pass over each tensor instead of ten."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in learned(groups).values())
    return torch.optim.Adam(groups, lr=1.0, fused=on_cpu or None)


def snapshot(state: TrainState, optimizer: torch.optim.Adam) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A phase as tensors and JSON facts, from which :func:`restore` goes on with the same bits."""
    tensors = {f"best/{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in learned(optimizer.param_groups).items():
        tensors[f"now/{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    return tensors, {"step": state.step, "best_loss": state.best_loss, "losses": state.losses}


def restore(
    state: TrainState, optimizer: torch.optim.Adam, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Put a phase's state, parameters and Adam moments back in place."""
    state.step, state.best_loss = facts["step"], facts["best_loss"]
    state.losses = [(step, loss) for step, loss in facts["losses"]]
    parameters = learned(optimizer.param_groups)
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "best":
                state.best[name] = value.to(parameters[name].device)
            elif kind == "now":
                parameters[name].copy_(value)
            else:
                # Adam counts its steps on the CPU.
                place = value.device if kind == "step" else parameters[name].device
                optimizer.state[parameters[name]][kind] = value.to(place, copy=True)


def run_phase(
    task: Task,
    phase: PhaseConfig,
    state: TrainState,
    optimizer: torch.optim.Adam,
    *,
    temporal: bool,
    after_step: Callable[[TrainState, float], None],
) -> None:
    """Train from `state.step` to the end, then put the best tensors in place. Never ends worse than it began.

    A loss that is not finite is told, and ends the phase.

    Args:
        task: What is trained, on what.
        phase: How.
        state: Changed in place.
        optimizer: Adam over `trainable(...)`.
        temporal: Whether this is phase 1.
        after_step: Called with the state and the loss after every update; may save both.
    """
    parameters = learned(optimizer.param_groups)
    every = max(1, math.ceil(phase.steps / VALIDATIONS_PER_PHASE))
    if state.step == 0:
        _validate(task, parameters, state)
    while not finished(phase, state):
        rate = 0.5 * (1 + math.cos(math.pi * state.step / phase.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (0.05 + 0.95 * rate)
        optimizer.zero_grad(set_to_none=True)
        loss = _backpropagate(task, phase, state.step, temporal=temporal)
        loss = task.workers.sum_gradients(list(parameters.values()), loss)
        if not math.isfinite(loss):
            # No later update is any better: Adam's moments keep it.
            state.broken_at = state.step + 1
            name = "temporal" if temporal else "sensitive"
            logger.warning(
                "the training loss of the %s phase is %g at update %d of %d: the phase ends here, with the best that "
                "its validations found (%g; 1 is the start); lower its learning rates in the recipe",
                *(name, loss, state.step + 1, phase.steps, state.best_loss),
            )
            break
        optimizer.step()
        state.step += 1
        if state.step % every == 0 or state.step == phase.steps:
            _validate(task, parameters, state)
        after_step(state, loss)
    with torch.no_grad():
        for name, tensor in state.best.items():
            parameters[name].copy_(tensor)
    for layer in quantized_layers(task.student).values():
        layer.merge_low_rank()


def finished(phase: PhaseConfig, state: TrainState) -> bool:
    """Whether all updates are done, or the last `patience` validations found nothing better."""
    found = [loss for _, loss in state.losses]
    stale = len(found) - 1 - found.index(min(found)) if found else 0
    return state.step >= phase.steps or 0 < phase.patience <= stale


def _validate(task: Task, parameters: dict[str, Tensor], state: TrainState) -> None:
    loss = task.validation_loss()
    state.losses.append((state.step, loss))
    if not state.best or loss < state.best_loss:
        state.best_loss = loss
        state.best = {name: tensor.detach().clone() for name, tensor in parameters.items()}


def _backpropagate(task: Task, phase: PhaseConfig, step: int, *, temporal: bool) -> float:
    """Add the gradients of one update, and give its loss: of this process's share of it."""
    # A generator of each step's own makes the order of samples independent of where a run was interrupted.
    generator = torch.Generator().manual_seed(((task.seed << 24) + (int(temporal) << 23) + step) % SEEDS)
    terms: list[Callable[[], Tensor]] = []
    if temporal and task.trace.ends:
        terms.append(_temporal_term(task, generator))
    slices = []
    if not temporal or step % phase.network_every == 0:
        drawn = losses.draw(
            task.data,
            task.training,
            task.objective,
            batch_size=phase.batch_size,
            num_walks=phase.walks,
            generator=generator,
            own=task.own,
        )
        slices = drawn.share(task.workers.index, task.workers.count).slices(task.objective)
    for part in slices:
        terms.append(functools.partial(losses.network_loss, task.student, task.data, task.objective, part))
    total = 0.0
    with learned_weights.quantized_once(quantized_layers(task.student).values()):
        # Whatever fits into memory goes through backpropagation as one.
        for together in [terms] if len(slices) <= 1 else [[term] for term in terms]:
            with autocast(task.data.device, task.precision):
                found = [term() for term in together]
            if any(term.requires_grad for term in found):
                loss = torch.stack(found).sum()
                loss.backward()
                total += float(loss.detach())
    return total


def _temporal_term(task: Task, generator: torch.Generator) -> Callable[[], Tensor]:
    timestep = torch.rand(TIMESTEPS_PER_LOCAL_BATCH, generator=generator) * task.last_time
    conditioning = losses.temporal_conditioning(
        task.trace, task.data, timestep.numel(), generator, task.training
    )
    timestep = timestep.to(task.data.device)

    def term() -> Tensor:
        loss = losses.temporal_loss(
            task.student, task.teacher, task.trace, timestep, conditioning, task.context
        )
        # It is little work, and a ratio of means: every process computes all of it.
        return loss if task.workers.count == 1 else loss / task.workers.count

    return term


def quantizers_are_finite(denoiser: nn.Module) -> bool:
    """Whether every learned scale of `denoiser` is a finite, positive number, and every table finite."""
    scales = [layer.weight_scale() for layer in quantized_layers(denoiser).values()]
    scales += [
        module.group_scale() for module in denoiser.modules() if isinstance(module, ActivationQuantizer)
    ]
    tables = [module.table for module in time_tables(denoiser).values()]
    return all(bool((torch.isfinite(scale) & (scale > 0)).all()) for scale in scales) and all(
        bool(torch.isfinite(table).all()) for table in tables
    )
