"""The house: which file may import which, nothing happens at import, and what the README promises."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {       # ground first: each imports from those above it alone
    "zscore_kd": {"torch"},
    "logit_kd": {"torch", "zscore_kd"},
    "feature_kd": {"torch"},
    "weights": {"torch", "safetensors"},
    "models": {"torch", "weights"},
    "data": {"torch", "torchvision", "numpy"},
    "folders": {"torch", "torchvision", "numpy", "PIL", "data"},
    "randaugment": {"torch", "numpy", "data"},
    "recipes": set(),
    "run": {"torch", "click"},
    "cli": {"torch", "click", "recipes", "run"},
    "distributed": {"torch", "click", "cli", "run"},
    "networks": {"torch", "torchvision", "feature_kd", "weights", "models", "data", "folders", "run"},
    "distill": {"torch", "click", "zscore_kd", "logit_kd", "models", "recipes", "run", "cli", "networks"},
    "teacher": {"torch", "weights", "models", "data"},
    "train_cifar": {"torch", "click", "logit_kd", "models", "data", "folders", "randaugment", "recipes",
                    "run", "cli", "distributed", "networks", "distill", "teacher"},
    "train_imagenet": {"torch", "torchvision", "click", "logit_kd", "models", "data", "folders",
                       "randaugment", "recipes", "run", "cli", "distributed", "networks", "distill",
                       "teacher"},
    "export": {"torch", "numpy", "onnx", "onnxruntime", "click", "models", "data", "folders", "run", "cli",
               "networks"},
    "predict": {"onnxruntime", "numpy", "PIL"},
    "figures": {"matplotlib", "torch", "click", "zscore_kd", "weights", "models", "data", "recipes", "run",
                "cli", "teacher"},
    "reproduce": {"torch", "click", "weights", "models", "data", "recipes", "run", "cli", "distill",
                  "teacher", "train_cifar"},
    "bench": {"torch", "torchvision", "numpy", "click", "zscore_kd", "logit_kd", "feature_kd", "models",
              "data", "folders", "recipes", "run", "cli", "networks", "distill", "teacher", "train_cifar",
              "train_imagenet"},
}
FILES = [p for p in sorted(ROOT.glob("*.py")) if not p.stem.startswith(("test_", "conftest"))]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import breaks a copied file"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_room_imports_only_what_the_design_allows(path):
    found = set(imports(ast.parse(path.read_text()))) - set(sys.stdlib_module_names)
    assert found == ROOMS[path.stem]
    above = list(ROOMS)[:list(ROOMS).index(path.stem)]
    assert found & set(ROOMS) <= set(above)
    assert not found & {"train_cifar", "train_imagenet"} or path.stem in ("reproduce", "bench")


def test_lines_hold_110_columns():
    """Or a count of lines means little."""
    long = [f"{path.relative_to(ROOT)}:{i}" for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert long == []


def test_every_room_is_in_the_readme_and_every_package_is_required():
    readme, required = (ROOT / "README.md").read_text(), (ROOT / "requirements.txt").read_text()
    assert all(f"`{path.name}`" in readme for path in FILES)
    # torchvision brings the first, the README's commands the others
    packages = set().union(*ROOMS.values()) - set(ROOMS) - {"PIL", "matplotlib", "safetensors"}
    assert all(re.search(rf"^{package}>=", required, re.M) for package in packages)


def test_importing_does_nothing(tmp_path):
    """No argv, no download, no folder, no seed; and nothing that only Unix has."""
    code = f"""
import builtins, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--nonsense"]
real = builtins.__import__
def windows(name, *rest, **more):
    if (name in ("resource", "fcntl", "termios", "pwd")
            and sys._getframe(1).f_globals.get("__file__", "").startswith({str(ROOT)!r})):
        raise ImportError(name)
    return real(name, *rest, **more)
builtins.__import__ = windows
import torch
before = torch.random.get_rng_state()
import {", ".join(path.stem for path in FILES)}
assert torch.equal(before, torch.random.get_rng_state()) and not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_documents_commands_have_flags_that_exist():
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "NOTES.md", "CONTRIBUTING.md"))
    text = text.replace("\\\n", " ")
    commands = re.findall(r"(?:python3?|torchrun[^\n]*?) (\w+\.py)((?: +[^\n`#]+)?)", text)
    assert len(commands) > 15
    for script, rest in commands:
        known = flags_of(script.removesuffix(".py"))
        for flag in re.findall(r"--[a-z0-9-]+", rest):
            assert flag in known, f"{script} {flag}"


@functools.cache
def flags_of(script):
    main = importlib.import_module(script).main
    if isinstance(main, click.Command):
        commands = [main, *getattr(main, "commands", {}).values()]
        parameters = [p for command in commands for p in command.params]
        return {flag for p in parameters for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    return set(re.findall(r"--[a-z0-9-]+", (ROOT / f"{script}.py").read_text()))
