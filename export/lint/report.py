"""What lint finds, as plain data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Execution = Literal["int8", "int4 storage", "float", "breaks"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
EXECUTIONS: tuple[Execution, ...] = ("int8", "int4 storage", "float", "breaks")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a rule noticed.

    Attributes:
        rule: Name of the rule.
        severity: "error" where the target refuses the graph or computes other numbers, "warning" where something is
            lost, "info" for a hint.
        breaks: The target refuses the graph, or its process dies of it.
        component: Of the model.
        node: Name of the node, or empty where it concerns the whole graph.
        message: What, why, and what to do.
    """

    rule: str
    severity: Severity
    breaks: bool
    component: str
    node: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product and what the target does with it.

    Attributes:
        component: Of the model.
        name: Of the node.
        op_type: Of the node.
        operands: What its two operands are stored or quantized as, for example ("int8", "int4/64").
        execution: The arithmetic it runs in.
        reasons: Why not better, or what to know.
        macs: Multiply-accumulates at the report's dimensions; None where shapes are unknown.
    """

    component: str
    name: str
    op_type: str
    operands: tuple[str, ...]
    execution: Execution
    reasons: tuple[str, ...]
    macs: int | None


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """Everything lint says about one model and one target; true where nothing is an error."""

    path: str
    target: str
    dimensions: dict[str, int]
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def breaks(self) -> bool:
        """Whether the target refuses the model."""
        return any(finding.breaks for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """Counts, and shares of layers and of multiply-accumulates by arithmetic."""
        return {
            "layers": len(self.layers),
            "macs": sum(layer.macs or 0 for layer in self.layers),
            "layers_without_shapes": sum(layer.macs is None for layer in self.layers),
            "share_of_layers": shares((layer.execution, 1) for layer in self.layers),
            "share_of_macs": shares((layer.execution, layer.macs or 0) for layer in self.layers),
            "findings": {
                severity: sum(finding.severity == severity for finding in self.findings)
                for severity in SEVERITIES
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types."""
        return {
            "path": self.path,
            "target": self.target,
            "ok": bool(self),
            "breaks": self.breaks,
            "dimensions": self.dimensions,
            "summary": self.summary(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


def shares(weights: Iterable[tuple[Execution, int]]) -> dict[str, float]:
    """The part of each arithmetic in the whole, in [0, 1]; all 0 where there is nothing."""
    totals: Counter[str] = Counter()
    for execution, weight in weights:
        totals[execution] += weight
    whole = sum(totals.values()) or 1
    return {execution: totals[execution] / whole for execution in EXECUTIONS}
