"""Teachers are found in the promised order; the archive comes from a server on the loopback interface."""

import functools
import http.server
import io
import os
import re
import tarfile
import threading

import pytest
import torch

import teacher
from data import synthetic
from models import create_model
from teacher import Teacher, download_teachers, find_teacher, load_teacher, weights_sha256


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def serve(tmp_path):
    """Serves a folder on the loopback interface; gives its address and what was asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            asked.append(values[0])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def archive(path, names, extra=()):
    """An archive laid out as mdistiller's."""
    with tarfile.open(path, "w") as file:
        for name in names:
            torch.manual_seed(len(name))
            content = io.BytesIO()
            torch.save({"epoch": 240, "model": create_model(name).state_dict(), "accuracy": torch.tensor(70.0)}, content)
            add(file, f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth", content.getvalue())
        for name, content in extra:
            add(file, name, content)


def add(file, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def test_the_named_file_comes_first(checkpoints):
    checkpoints.mkdir()
    (checkpoints / "resnet56.pt").write_bytes(b"")
    assert find_teacher("resnet56", "mine.pt") == (teacher.Path("mine.pt"), "mine.pt")
    assert find_teacher("resnet56") == (checkpoints / "resnet56.pt", "checkpoints/resnet56.pt")


def test_the_archive_is_downloaded_once_and_gives_every_teacher_in_it(checkpoints, serve):
    folder, url, asked = serve
    archive(folder / "teachers.tar", ["resnet56", "vgg13"], [("cifar_teachers/README", b"x"), ("../../evil_vanilla/x", b"x"),
                                                            ("/tmp/resnet110_vanilla/other.pth", b"x")])
    lines = []
    path, source = find_teacher("resnet56", url=f"{url}/teachers.tar", say=lines.append)
    assert path == checkpoints / "mdistiller" / "resnet56.pth" and "mdistiller" in source
    assert f"{url}/teachers.tar" in lines[0]
    assert find_teacher("vgg13", url=f"{url}/teachers.tar")[0] == checkpoints / "mdistiller" / "vgg13.pth"
    assert len(asked) == 1
    assert sorted(os.listdir(checkpoints / "mdistiller")) == ["resnet56.pth", "vgg13.pth"]
    loaded = load_teacher("resnet56", path, source, "cpu")
    torch.manual_seed(len("resnet56"))
    assert loaded.sha256 == weights_sha256(create_model("resnet56"))


def test_a_cut_download_leaves_nothing_half_written(checkpoints, serve):
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "vgg13"])
    data = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[:1_000_000])
    path, reason = find_teacher("resnet56", url=f"{url}/cut.tar", say=lambda line: None)
    assert path is None and "could not be downloaded" in reason
    assert os.listdir(checkpoints / "mdistiller") == []


@pytest.mark.parametrize("name, place, words", [
    ("resnet56", "/missing.tar", "no checkpoints/resnet56.pt, and mdistiller's teachers could not be downloaded .*404"),
    ("resnet56", "/text.tar", "could not be downloaded"),
    ("resnet56", "/others.tar", "no resnet56 in http"),
    ("resnet20", "/missing.tar", "mdistiller publishes no resnet20"),
])
def test_no_teacher_says_why(serve, name, place, words):
    folder, url, _ = serve
    (folder / "text.tar").write_text("not an archive")
    archive(folder / "others.tar", ["vgg13"])
    path, reason = find_teacher(name, url=url + place, say=lambda line: None)
    assert path is None
    assert re.search(words, reason), reason


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.tar", "http://127.0.0.1:abc/x.tar", "teachers.tar"])
def test_no_network_or_no_address_says_why(url):
    path, reason = find_teacher("resnet56", url=url, say=lambda line: None)
    assert path is None and "could not be downloaded" in reason


def test_answers_are_the_frozen_networks_logits():
    network = create_model("resnet8").train()
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    answers = Teacher(network, "cpu").answers(images)
    with torch.no_grad():
        expected = network.eval()(images.detach())
    torch.testing.assert_close(answers, expected)
    assert not answers.requires_grad and answers.dtype == torch.float32
    before = weights_sha256(network)
    Teacher(network, "cpu").answers(images)
    assert weights_sha256(network) == before        # no batch norm statistics moved
    half = Teacher(network, "cpu", "bf16").answers(images)
    assert half.dtype == torch.float32 and 0 < (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_teacher_below_the_published_accuracy_is_a_warning():
    split = synthetic(100, 1)
    top1, line = Teacher(create_model("resnet8"), "cpu", source="mine.pt").check(split, published=79.42)
    assert f"teacher resnet8 (mine.pt): {top1:.2f} % top-1" in line and "published 79.42" in line and "warning" in line
    assert "warning" not in Teacher(create_model("resnet8"), "cpu").check(split, published=top1 + 0.9)[1]


def test_the_hash_tells_weights_apart():
    torch.manual_seed(0)
    network = create_model("resnet8")
    before = weights_sha256(network)
    assert before == weights_sha256(network.to(memory_format=torch.channels_last))
    network.bn1.running_mean[0] += 1e-6
    assert before != weights_sha256(network)


def test_download_teachers_ignores_what_it_does_not_know(tmp_path, serve):
    folder, url, _ = serve
    archive(folder / "t.tar", [], [("x/resnet57_vanilla/ckpt_epoch_240.pth", b"x"), ("x/vgg13_vanilla/last.pth", b"x")])
    download_teachers(f"{url}/t.tar", tmp_path / "to")
    assert os.listdir(tmp_path / "to") == []
