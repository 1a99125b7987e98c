"""What falling back would bring to one component: its engine, the one without quantizers, and one in between, timed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.config import BuildConfig, ProgressEvent
from quest_deploy.engines.layer_times import LayerTimes, time_layers
from quest_deploy.engines.trt_build import ONNX_NAME, PLAN_NAME, build_one
from quest_deploy.errors import QuestDeployError
from quest_deploy.export.quantized import graph_products, without_quantizers
from quest_deploy.model.spec import ComponentSpec
from quest_deploy.product_times import ProductTimes, compare

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A component to measure.

    Attributes:
        name: Of the component.
        graph: Its ONNX file.
        spec: What its engine takes and gives.
        profiles: Its optimization profiles, in JSON types.
        config: Of the build.
        progress: Told how far its further engines are.
    """

    name: str
    graph: Path
    spec: ComponentSpec
    profiles: list[Any]
    config: BuildConfig
    progress: Progress | None = None


class UnlikeEnginesError(QuestDeployError):
    """Engines that cannot be compared, since for want of memory one of them was built with less than the others."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine with some products in floats, its times, and what the manifest says about it."""

    plan: Path
    report: dict[str, Any]
    times: LayerTimes


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured of a component.

    Attributes:
        low: The engine as it was asked for.
        full: The one without quantizers.
        rows: Both, product by product.
        mixed: The one with what is slower in floats; None where nothing is.
    """

    low: LayerTimes
    full: Candidate
    rows: tuple[ProductTimes, ...]
    mixed: Candidate | None

    @property
    def slower(self) -> tuple[str, ...]:
        """Products that are slower in low precision."""
        return tuple(name for row in self.rows if row.is_slower for name in row.products)

    @property
    def is_worth_it(self) -> bool:
        """Whether the component as a whole is faster so: quantizers cost at their edges, too."""
        return self.mixed is not None and self.mixed.times.total_ms < self.low.total_ms

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "low_ms": self.low.total_ms,
            "float_ms": self.full.times.total_ms,
            "mixed_ms": None if self.mixed is None else self.mixed.times.total_ms,
            "left_in_float": list(self.slower) if self.is_worth_it else [],
            "slower": [row.to_json() for row in self.rows if row.is_slower],
            "measured": sum(len(row.products) for row in self.rows if row.is_measured),
            "not_measured": [name for row in self.rows if not row.is_measured for name in row.products],
        }


def measure(subject: Subject, plan: Path, folder: Path) -> Trial:
    """Time a component's engine, the one without quantizers, and one with what is slower in floats.

    Args:
        subject: The component.
        plan: Its engine.
        folder: Where further engines may lie.

    Raises:
        UnlikeEnginesError: memory did not suffice to build a further engine with the same options.
    """
    products = graph_products(subject.graph)
    removable = {product.name for product in products if product.removable}
    logger.info("%s: timing %d quantized products", subject.name, len(removable))
    low = time_layers(plan, subject.spec, subject.config)
    full = build(subject, removable, folder / "float")
    rows = tuple(compare(products, low, full.times))
    slower = {name for row in rows if row.is_slower for name in row.products}
    mixed = None
    if slower:
        mixed = full if slower == removable else build(subject, slower, folder / "mixed")
    return Trial(low=low, full=full, rows=rows, mixed=mixed)


def build(subject: Subject, products: Collection[str], folder: Path) -> Candidate:
    """Build and time the engine of a component with these products in floats."""
    without_quantizers(subject.graph, products, folder / "onnx" / subject.name / ONNX_NAME)
    progress = subject.progress

    def report(event: ProgressEvent) -> None:
        assert progress is not None
        progress(dataclasses.replace(event, stage=f"build-engine, {len(products)} products in floats"))

    built = build_one(
        subject.name,
        folder / "onnx",
        folder / "plans",
        subject.profiles,
        subject.config,
        None if progress is None else report,
    )
    check_built_alike(f"the engine with {len(products)} products in floats", built)
    plan = folder / "plans" / subject.name / PLAN_NAME
    return Candidate(plan=plan, report=built, times=time_layers(plan, subject.spec, subject.config))


def check_built_alike(engine: str, report: Mapping[str, Any]) -> None:
    """Refuse an engine that was built with other options than the configuration says.

    Args:
        engine: Which it is, for the message.
        report: What the manifest says about it, or will.

    Raises:
        UnlikeEnginesError: memory did not suffice for those options.
    """
    if report.get("fallback"):
        raise UnlikeEnginesError(
            f"for want of memory {engine} was built with {', '.join(report['fallback'])}, and only engines that are "
            "built alike are compared; raise --memory-limit, or build on a machine with more memory"
        )


def say(component: str, trial: Trial) -> None:
    """Log what was measured and what becomes of it."""
    for row in trial.rows:
        if row.is_slower:
            logger.info(
                "%s: %s: %.3f ms in low precision, %.3f ms in floats",
                component,
                ", ".join(row.products),
                row.low_ms,
                row.float_ms,
            )
    if not any(row.is_measured for row in trial.rows):
        logger.warning("%s: no layer of its engines names a product, so nothing could be compared", component)
    elif trial.mixed is None:
        logger.info("%s: nothing is slower in low precision", component)
    elif trial.is_worth_it:
        logger.info(
            "%s: %d products stay in floats: %.3f ms in all layers, before %.3f ms; their activations are no longer "
            "rounded, so pictures differ from the checkpoint's",
            component,
            len(trial.slower),
            trial.mixed.times.total_ms,
            trial.low.total_ms,
        )
    else:
        logger.info(
            "%s: with %d products in floats all layers take %.3f ms, before %.3f ms: kept as it was",
            component,
            len(trial.slower),
            trial.mixed.times.total_ms,
            trial.low.total_ms,
        )
