"""Promises about the repository itself: what the wheel holds, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Where the wheel puts each top-level directory of the tree.
INSTALLED_AS = {
    "quest_deploy": "quest_deploy",
    "export": "quest_deploy/export",
    "engines": "quest_deploy/engines",
}
CODE_SUFFIXES = {".py", ".sh", ".toml", ".j2", ".yaml", ".yml"}
MAX_LINES = 400

# In pieces where the whole would make this file break its own rule.
FORBIDDEN_TEXT = {
    "absolute path": r"(?<![\w.~-])/(?:home|root|work|Users|opt|mnt|build_area)/\w",
    "package index": r"(?:pypi\.org|pythonhosted\.org|pypi\.nvidia\.com|download\.pytorch\.org|ngc\.nvidia\.com)",
    "index option": r"--(?:extra-)?index-url[ =]\S|--find-links[ =]\S|--trusted-host",
    "private key": r"BEGIN [A-Z ]*PRIVATE KEY",
    "token": r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,})\b",
    "password in a URL": r"://[^/\s:@\"'{}]+:[^/\s:@\"'{}]+@",
}
PICKLING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def repository_files(repository: Path) -> list[Path]:
    """Every file of the tree that git tracks or would add, relative to the root."""
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=True,
    ).stdout.decode()
    paths = (Path(name) for name in listing.split("\0") if name)
    return sorted(path for path in paths if (repository / path).is_file())


@pytest.fixture(scope="module")
def files(repository: Path) -> list[Path]:
    return repository_files(repository)


@pytest.fixture(scope="module")
def package_files(files: list[Path]) -> list[Path]:
    return [path for path in files if path.parts[0] in INSTALLED_AS]


@pytest.fixture(scope="module")
def wheel(
    repository: Path, package_files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree so that no build directory is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    for path in [*package_files, Path("pyproject.toml"), Path("README.md"), Path("LICENSE")]:
        (work / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (work / "source" / path).write_bytes((repository / path).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(work), str(work / "source")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = work.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_the_tree_and_nothing_else(
    wheel: zipfile.ZipFile, package_files: list[Path]
) -> None:
    expected = {"/".join([INSTALLED_AS[path.parts[0]], *path.parts[1:]]) for path in package_files}
    got = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert got == expected


def test_wheel_installs_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"quest_deploy"}


def test_wheel_carries_license_and_entry_point(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "quest-deploy = quest_deploy.commands:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_no_code_file_is_longer_than_400_lines(repository: Path, files: list[Path]) -> None:
    lengths = {
        str(path): len((repository / path).read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix in CODE_SUFFIXES or path.name == "Makefile"
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_file_holds(what: str, repository: Path, files: list[Path]) -> None:
    found = []
    for path in files:
        content = (repository / path).read_bytes()
        if path.name == Path(__file__).name or b"\0" in content[:8192]:
            continue  # the patterns themselves; weights and pictures
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if re.search(FORBIDDEN_TEXT[what], line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("absolute path", 'open("/home/someone/model")'),
        ("package index", "https://files.pythonhosted.org/packages/x.whl"),
        ("index option", "pip install --extra-index-url https://example.org x"),
        ("private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("token", "hf_" + "a1B2" * 9),
        ("password in a URL", "https://user:secret@example.org/"),
    ],
)
def test_forbidden_text_is_recognized(what: str, text: str) -> None:
    assert re.search(FORBIDDEN_TEXT[what], text)


def pickling(source: str) -> list[str]:
    """Every place in Python source that could read or write a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name.split(".")[0] for alias in names]
                found += [f"import {module}" for module in modules if module in PICKLING_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLING_MODULES:
                found.append(f"from {module}")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
                found.append(f"torch.{name}")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append("allow_pickle=True")
    return found


def test_package_never_pickles(repository: Path, package_files: list[Path]) -> None:
    sources = [path for path in package_files if path.suffix == ".py"]
    found = {str(path): pickling((repository / path).read_text(encoding="utf-8")) for path in sources}
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "torch.load(path)", "np.load(path, allow_pickle=True)"],
)
def test_pickling_is_recognized(source: str) -> None:
    assert pickling(source)


# Names of modules that are not those of their packages, and what comes with packages that are named.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "tensorrt-rtx-cu13": "tensorrt_rtx"}
BROUGHT_ALONG = {"google", "huggingface_hub", "markupsafe", "ml_dtypes"}
# With importlib.
IMPORTED_BY_NAME = {"tensorrt", "tensorrt_rtx"}


def test_dependencies_are_what_the_package_imports(wheel: zipfile.ZipFile, repository: Path) -> None:
    imported = set()
    for name in (name for name in wheel.namelist() if name.endswith(".py")):
        for node in ast.walk(ast.parse(wheel.read(name))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {module.partition(".")[0] for module in found}
    imported -= {"quest_deploy", *sys.stdlib_module_names}
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    wanted: dict[bool, set[str]] = {True: set(), False: set()}
    for line in re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE):
        if any(f"extra == '{extra}'" in line.replace('"', "'") for extra in ("dev", "examples", "baselines")):
            continue
        name = re.split(r"[^\w.-]", line)[0]
        wanted["extra ==" in line].add(IMPORTED_AS.get(name, name.replace("-", "_")))
    needed, extras = wanted[False], wanted[True]
    assert needed - imported == set(), "nothing imports these"
    assert imported - needed - extras - BROUGHT_ALONG == set(), "nothing installs these"
    assert extras - imported - IMPORTED_BY_NAME == set()


def test_imports_from_any_directory_come_from_the_checkout(repository: Path, tmp_path: Path) -> None:
    code = (
        "import quest_deploy.engines as n, quest_deploy.export as x; print(n.__file__, x.__file__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent for line in done.stdout.split()] == [
        repository / "engines",
        repository / "export",
    ]


def test_a_checkout_is_whole_without_its_installation(repository: Path) -> None:
    """Who installed the package (not editable) and works in the checkout imports the checkout's half of it."""
    code = (
        "import quest_deploy.engines as n, quest_deploy.export as x; print(n.__file__, x.__file__, sep='\\n')"
    )
    # Without site-packages: nothing is installed.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, ''); {code}"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent for line in done.stdout.split()] == [
        repository / "engines",
        repository / "export",
    ]


WEIGHTS = {
    "pipeline": {
        "text_encoder/model.safetensors": "9d63a7fdc17980e7",
        "unet/diffusion_pytorch_model.safetensors": "271be146f87761ba",
        "vae/diffusion_pytorch_model.safetensors": "72ed342004f6c44d",
    },
    "digits-class": {"unet/diffusion_pytorch_model.safetensors": "184727cffb25e29e"},
    "digits": {"unet/diffusion_pytorch_model.safetensors": "54e52ad847237122"},
}


@pytest.mark.parametrize("model", WEIGHTS)
def test_bundled_model_is_unchanged_since_it_was_trained(model: str, repository: Path) -> None:
    """Every figure in the repository was measured on these weights."""
    import hashlib

    directory = repository / "reference-model" / model
    digests = {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(directory.rglob("*.safetensors"))
    }
    assert digests == WEIGHTS[model]
