"""Fixtures that several test files use."""

import contextlib
import functools
import http.server
import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

import teacher
from run import Run

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:     # one thread for each test process, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def forked():
    """The context of processes forked from a server that has imported torch and the scripts, once."""
    forkserver.set_forkserver_preload(["train_cifar", "train_imagenet"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))       # where it looks, whatever the folder a test is in
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run_in(out="runs"):
    """The folder of the only run in a folder of runs."""
    found, = (path.parent for path in Path(out).glob("*/config.json"))
    return found


@pytest.fixture(scope="session")
def shared():
    """The folder of reference material beside the project; tests that need it are skipped where it is not."""
    folder = ROOT.parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("needs the reference material in ../shared")
    return folder


@pytest.fixture(scope="session")
def cifar(shared, tmp_path_factory):
    """A folder with the real CIFAR-100."""
    folder = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, shared / "cifar100" / "unpack.py", folder], check=True,
                   stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing that a test leaves out is downloaded from the real places."""
    for reader in (CIFAR10, CIFAR100):
        monkeypatch.setattr(reader, "url", f"http://127.0.0.1:9/{reader.filename}")
    monkeypatch.setattr(teacher, "PYTORCH_CIFAR_MODELS_URL", "http://127.0.0.1:9/")


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """No test finds the modules of another one's folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Numbers are a CPU's, on every machine, but for tests that are marked `gpu`."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def killed(monkeypatch):
    """A context in which a run is killed by its save of (epochs, steps) that are done: --save-every 1e-9."""
    class Killed(BaseException):
        pass

    @contextlib.contextmanager
    def context(epoch=1, step=2):
        def save(run, state, real=Run.save):
            real(run, state)
            if (state["epoch"], state["step"]) == (epoch, step):
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "save", save)
            yield
    return context


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with ETag, Range, If-Range, as the public hosts do; breaks off once after `cut` bytes."""

    def log_message(self, form, *values):
        self.server.asked.append(values[0])

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body, tag = path.read_bytes(), self.server.tag
        wanted = self.headers["Range"] if self.headers["If-Range"] == tag else None
        self.server.ranges.append(wanted)
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if first >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("ETag", tag)
        self.end_headers()
        end, self.server.cut = first + self.server.cut if self.server.cut else len(body), 0
        self.wfile.write(body[first:end])


@pytest.fixture
def serve(tmp_path):
    """Serves a folder on the loopback interface: (folder, address, server).

    server.asked holds the requests, server.ranges their ranges.
    """
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.asked, server.ranges, server.cut, server.tag = [], [], 0, '"1"'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()
