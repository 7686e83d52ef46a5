"""The house: which file may import which, nothing happens at import, and what the README promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "zscore_kd": {"torch"},
    "weights": {"torch", "safetensors"},
    "models": {"torch", "weights"},
    "data": {"torch", "torchvision", "numpy", "PIL"},
    "recipes": set(),
    "teacher": {"torch", "models", "data", "weights"},
    "figures": {"matplotlib", "torch", "click", "run", "data", "models", "teacher", "zscore_kd", "weights"},
    "train_imagenet": {"torch", "torchvision", "click", "zscore_kd", "models", "data", "recipes", "teacher", "run", "weights"},
    "export": {"torch", "torchvision", "numpy", "onnx", "onnxruntime", "click", "models", "data", "run", "weights"},
    "predict": {"onnxruntime", "numpy", "PIL"},
    "bench": {"torch", "torchvision", "click", "train_cifar", "train_imagenet", "models", "data", "recipes", "teacher", "run", "zscore_kd"},
    "reproduce": {"torch", "click", "train_cifar", "recipes", "run", "models", "data", "teacher", "weights"},
    "run": {"torch", "click"},
    "train_cifar": {"torch", "click", "zscore_kd", "models", "data", "recipes", "teacher", "run", "weights"},
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
    assert found <= ROOMS[path.stem]


def test_every_room_is_in_the_readme_and_every_package_is_required():
    readme, required = (ROOT / "README.md").read_text(), (ROOT / "requirements.txt").read_text()
    assert all(f"`{path.name}`" in readme for path in FILES)
    packages = set().union(*ROOMS.values()) - set(ROOMS) - {"PIL", "matplotlib", "safetensors"}      # torchvision brings the one, the README's commands the other
    assert all(re.search(rf"^{package}>=", required, re.M) for package in packages)


def test_importing_does_nothing(tmp_path):
    """No argv, no download, no folder, no seed; and nothing that only Unix has."""
    code = f"""
import builtins, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--nonsense"]
real = builtins.__import__
def windows(name, *rest, **more):
    if name in ("resource", "fcntl", "termios", "pwd") and sys._getframe(1).f_globals.get("__file__", "").startswith({str(ROOT)!r}):
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


def test_the_readmes_commands_have_flags_that_exist():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python3? (\w+\.py)((?: +[^\n`#]+)?)", text)
    assert len(commands) > 5
    for script, rest in commands:
        known = subprocess_help(script)
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in known, f"{script} {flag}"


def subprocess_help(script, seen={}):
    if script not in seen:
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        seen[script] = set(re.findall(r"--[a-z-]+", done.stdout))
    return seen[script]
