"""Which module may import which, nothing happens at import, and what the README promises."""

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
# ground first: each module imports from those before it alone
ORDER = ("zscore_kd", "logit_kd", "feature_kd", "models", "data", "randaugment",
         "recipes", "run", "cli", "distributed", "networks", "checkpoints", "teacher", "distill",
         "experiment", "train_cifar", "train_imagenet", "export", "predict", "figures", "reproduce", "bench")
ONLY = {        # of our own modules and of packages, where it is binding
    "zscore_kd": {"torch"}, "logit_kd": {"torch", "zscore_kd"}, "feature_kd": {"torch"}, "recipes": set(),
    "predict": {"onnxruntime", "numpy", "PIL"},
}
NEVER = {name: {"recipes", "train_cifar", "train_imagenet", "experiment", "distill"}
         for name in ("run", "distributed", "cli")}
PACKAGES = {"torch", "torchvision", "numpy", "click", "onnx", "onnxruntime", "filelock", "PIL", "matplotlib",
            "safetensors"}
FILES = [p for p in sorted(ROOT.glob("*.py")) if not p.stem.startswith(("test_", "conftest"))]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:      # a copied file in a package: logit_kd.py
                assert node.module == "zscore_kd"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_module_imports_only_what_the_design_allows(path):
    found = set(imports(ast.parse(path.read_text()))) - set(sys.stdlib_module_names)
    assert found <= ONLY.get(path.stem, PACKAGES | set(ORDER[:ORDER.index(path.stem)]))
    assert not found & NEVER.get(path.stem, set())
    assert not found & {"train_cifar", "train_imagenet"} or path.stem in ("reproduce", "bench")


def test_no_function_is_longer_than_60_lines():
    long = [f"{path.name}:{node.name}" for path in FILES for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60]
    assert long == []


def test_lines_hold_110_columns():
    """Or a count of lines means little."""
    long = [f"{path.relative_to(ROOT)}:{i}" for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert long == []


def test_every_module_is_in_the_readme_and_every_package_is_required():
    readme, required = (ROOT / "README.md").read_text(), (ROOT / "requirements.txt").read_text()
    assert all(f"`{path.name}`" in readme for path in FILES)
    # torchvision brings Pillow; matplotlib and safetensors are asked for where they are needed
    used = set().union(*(imports(ast.parse(path.read_text())) for path in FILES)) & PACKAGES
    assert all(re.search(rf"^{package}>=", required, re.M)
               for package in used - {"PIL", "matplotlib", "safetensors"})


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
