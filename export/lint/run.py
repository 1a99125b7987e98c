"""Applies every rule to every component and sums up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from quest_deploy.artifacts import MANIFEST_NAME, read_artifact
from quest_deploy.errors import ConfigError
from quest_deploy.export.lint import read
from quest_deploy.export.lint.execution import execution_of
from quest_deploy.export.lint.report import SEVERITIES, Execution, Finding, Layer, LintReport
from quest_deploy.export.lint.rules import RULES
from quest_deploy.export.lint.targets import LINT_TARGETS
from quest_deploy.export.lint.view import View, look_at
from quest_deploy.foreign import MODEL_INDEX_NAME


def run(path: Path, target: str, dimensions: Mapping[str, int]) -> LintReport:
    """See :func:`quest_deploy.export.lint.lint`."""
    if target not in LINT_TARGETS:
        raise ConfigError(f"target is {target!r}, expected one of {', '.join(LINT_TARGETS)}")
    wrong = {name: size for name, size in dimensions.items() if size < 1}
    if wrong:
        raise ConfigError(f"dimensions: got {wrong}, expected positive sizes")
    files = read.find_files(path)
    root = root_of(path)
    check_unchanged(path, root)
    sizes = {**read.default_dimensions(root), **dimensions}
    layers: list[Layer] = []
    findings: list[Finding] = []
    used: dict[str, int] = {}
    for component, file in files.items():
        proto = read.read_proto(file)
        findings += read.check_external_data(component, proto, file, target)
        own, proto = proto, read.written_out(proto)
        findings += read.check_functions(component, own, proto, target)
        proto, taken = read.resolve_shapes(proto, sizes)
        used |= taken
        view = look_at(component, read.to_ir(proto, file))
        found = sorted(apply_rules(view, target), key=lambda finding: SEVERITIES.index(finding.severity))
        findings += found
        layers += judge(view, found, target)
    check_names(dimensions, used)
    if finding := nothing_quantized(layers, root):
        findings.append(finding)
    return LintReport(
        path=str(path), target=target, dimensions=used, layers=tuple(layers), findings=tuple(findings)
    )


def check_names(dimensions: Mapping[str, int], used: Mapping[str, int]) -> None:
    """Refuse the size of a dimension that no graph has, by its name there or by the one that this package gives it."""
    known = {*used, *(read.known_as(name)[0] for name in used)}
    if unknown := [name for name in dimensions if name not in known]:
        there = f"some of {', '.join(used)}" if used else "none: every size is fixed"
        raise ConfigError(f"dimensions: got {', '.join(unknown)}, expected {there}")


def root_of(path: Path) -> Path:
    """The model's directory, which holds ``model_index.json``, of a file or a component's directory in it.

    `path` is made absolute without following links: the stores of some tools link to files that lie elsewhere.
    """
    path = Path(os.path.abspath(path))
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder.parent):
        if (candidate / MODEL_INDEX_NAME).is_file():
            return candidate
    return path if path.is_dir() else folder.parent


def check_unchanged(path: Path, root: Path) -> None:
    """Hash an artifact's files; what has no manifest, or lies below a directory that is no model's, is not hashed.

    Raises:
        ArtifactError: one is not what the manifest says.
    """
    given = path.is_dir() and path.samefile(root)
    if (root / MANIFEST_NAME).is_file() and (given or (root / MODEL_INDEX_NAME).is_file()):
        read_artifact(root)


def apply_rules(view: View, target: str) -> Iterator[Finding]:
    """What the rules notice, each under its function's name."""
    for rule in RULES:
        for problem in rule(view, target):
            yield Finding(
                rule=rule.__name__.replace("_", "-"),
                severity="error" if problem.breaks else problem.severity,
                breaks=problem.breaks,
                component=view.component,
                node=str(problem.node.name),
                message=problem.message,
            )


def judge(view: View, findings: list[Finding], target: str) -> Iterator[Layer]:
    """One row for each product: the arithmetic it runs in, unless a finding on it or its quantizers breaks it."""
    breaking: dict[str, list[str]] = {}
    for finding in findings:
        if finding.breaks:
            breaking.setdefault(finding.node, []).append(finding.rule)
    for product in view.products:
        names = dict.fromkeys(str(node.name) for node in product.nodes())
        broken = tuple(dict.fromkeys(rule for name in names for rule in breaking.get(name, ())))
        execution: Execution = "breaks"
        reasons = broken
        if not broken:
            execution, reasons = execution_of(product, view, target)
        yield Layer(
            component=view.component,
            name=str(product.node.name),
            op_type=product.node.op_type,
            operands=tuple(operand.describe() for operand in product.operands),
            execution=execution,
            reasons=reasons,
            macs=product.macs,
        )


def nothing_quantized(layers: list[Layer], root: Path) -> Finding | None:
    """Notice a model in which nothing at all is quantized.

    1. Fires where there are products and every one of them reads floats on both sides.
    2. It is a hint, not an error, where quest-deploy's own manifest says that this was wanted (mode none).
    """
    quantized = any(
        layer.execution != "float" or any("int" in kind for kind in layer.operands) for layer in layers
    )
    if not layers or quantized:
        return None
    config = read.read_json(root / MANIFEST_NAME).get("config")
    wanted = isinstance(config, dict) and config.get("mode") == "none"
    return Finding(
        rule="nothing-quantized",
        severity="info" if wanted else "error",
        breaks=False,
        component="",
        node="",
        message=f"all {len(layers)} products read floats"
        + (
            ", as the export's mode 'none' says"
            if wanted
            else "; export a quantized checkpoint with --mode int8"
        ),
    )
