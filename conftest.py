"""Fixtures that several test files use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def shared():
    """The folder of reference material beside the project; a test that needs it is skipped where it is not."""
    folder = ROOT.parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("needs the reference material in ../shared")
    return folder


@pytest.fixture(scope="session")
def cifar(shared, tmp_path_factory):
    """A folder with the real CIFAR-100."""
    folder = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, shared / "cifar100" / "unpack.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
