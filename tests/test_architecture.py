"""Holds docs/design.md true: the layers, what may be imported where, and that conf/ and lmexp/ are one map."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmexp.job.start import register_plugins

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    {"contracts"},
    {"tokenizer", "model", "corpus", "metric", "optimizer", "schedule", "decoding", "run"},
    {"objective", "data", "huggingface"},
    {"task", "callback"},
    {"job"},
)
ONLY_IN = {
    "hydra": {"job"},
    "omegaconf": {"job"},
    "lightning": {"data", "task", "callback", "job"},
}
CONF_ALONE = {"trainer", "logger", "paths", "experiment", "debug", "sweep", "hydra"}
"""Groups of conf/ whose options configure others' parts, or how a job runs, and need no package of their own."""

LMEXP_ALONE = {"run", "corpus", "huggingface"}
"""Packages without a group: what runs leave on disk; corpora stand in the data group's options; exchange of weights
belongs to jobs."""


def modules() -> list[Path]:
    return sorted((ROOT / "lmexp").rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "lmexp").parts
    return parts[0].removesuffix(".py")


def level(package: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if package in layer)


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        top, *rest = name.split(".")
        if top == "lmexp" and rest:
            other = rest[0]
            assert other == package or level(other) < level(package), f"{path} imports {name} from beside or above"
        if top in ONLY_IN:
            assert package in ONLY_IN[top], f"{path} imports {top}"
        if package == "corpus":
            assert top != "torch", f"{path} imports torch"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_happens_on_import(path: Path) -> None:
    """Modules define things; a call at their top level could only be a constant's."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), f"{path}:{node.lineno}"
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{path}:{node.lineno}"


def groups() -> set[str]:
    return {p.name for p in (ROOT / "conf").iterdir() if p.is_dir()}


def test_conf_and_lmexp_are_one_map() -> None:
    packages = {p.name for p in (ROOT / "lmexp").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert groups() - CONF_ALONE == packages - LMEXP_ALONE
    assert not list(ROOT.rglob("lmexp/**/utils*")), "there is no utils"


def targets() -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        for target in re.findall(r"_target_: ([\w.]+)", path.read_text(encoding="utf-8")):
            found.append((str(path.relative_to(ROOT)), target))
    return found


@pytest.mark.parametrize(("path", "target"), targets())
def test_targets_exist_in_their_groups_package(path: str, target: str) -> None:
    register_plugins()
    module, _, name = target.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    group = Path(path).parts[1]
    if group not in CONF_ALONE:
        assert module.split(".")[1] in (group, "corpus")


def test_only_experiments_override_groups() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        defaults = [d for d in content.get("defaults", ()) if isinstance(d, dict)]
        if path.parent.name == "experiment":
            lines = [li for li in path.read_text(encoding="utf-8").splitlines() if li.strip()]
            assert len(lines) <= 25, f"{path.name} is a recipe of {len(lines)} lines; expected a diff of at most 25"
        elif path.name != "config.yaml":
            assert not defaults, f"{path} overrides a group"
            for name in content.get("defaults", ()):
                base = path.with_name(f"{name}.yaml")
                others = path.parent == ROOT / "conf/hydra/launcher" and name == "ray"  # hydra-ray-launcher's
                if name != "_self_" and path.parent.name != "callback" and not others:
                    assert "defaults" not in yaml.safe_load(base.read_text(encoding="utf-8")), f"{path}: two levels"


def test_every_key_says_what_it_means() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#"), f"{path} has no comment on what it is"
        inherits = "defaults: [" in text and path.parent.name not in ("data", "callback")
        if inherits or path.parent.name in ("experiment", "debug", "paths"):
            continue  # the keys are explained where they are introduced
        for line in text.splitlines():
            key = re.match(r"\s*([a-z]\w*): \S", line)
            if key and key.group(1) not in ("defaults", "hydra", "chdir", "dir", "subdir", "mode", "output_subdir"):
                assert "#" in line or (path.name == "config.yaml" and "- " in line), f"{path}: {line}"


def test_help_and_cfg_import_neither_torch_nor_lightning() -> None:
    for arguments in (["--help"], ["--cfg", "job", "experiment=pretrain"]):
        program = (
            f"import sys, runpy; sys.argv = ['run.py', *{arguments!r}]; runpy.run_path('run.py', run_name='__main__')\n"
            "heavy = {'torch', 'lightning', 'datasets', 'numpy', 'tensorboard'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "experiment=" in done.stdout or "max_steps:" in done.stdout
