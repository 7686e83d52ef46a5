"""Teachers are found in the promised order; the archive comes from a server on the loopback interface."""

import hashlib
import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch

import data
import teacher as rooms_teacher
from data import crop_and_flip, epoch_draws, normalise, synthetic
from models import create_model
from teacher import Teacher, download_teachers, find_teacher, load_teacher, weights_sha256
from test_weights import repdistiller_teacher


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms_teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def archive(path, names, extra=()):
    """An archive laid out as mdistiller's, its members as RepDistiller writes a teacher: optimizer and numpy.float64 inside."""
    with tarfile.open(path, "w") as file:
        for name in names:
            content = io.BytesIO()
            torch.save(repdistiller_teacher(settled(name)), content, _use_new_zipfile_serialization=False)
            add(file, f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth", content.getvalue())
        for name, content in extra:
            add(file, name, content)


def settled(name):
    """An untrained network whose batch norms know its activations, so that its logits are of a usual size."""
    torch.manual_seed(len(name))
    network = create_model(name).train()
    with torch.no_grad():
        for _ in range(40):
            network(torch.rand(8, 3, 32, 32))
    return network


def add(file, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def test_the_named_file_comes_first(checkpoints):
    checkpoints.mkdir()
    (checkpoints / "resnet56.pt").write_bytes(b"")
    assert find_teacher("resnet56", "mine.pt") == (Path("mine.pt"), "mine.pt")
    assert find_teacher("resnet56") == (checkpoints / "resnet56.pt", "checkpoints/resnet56.pt")


def test_the_archive_is_downloaded_once_and_gives_every_teacher_in_it(checkpoints, serve):
    folder, url, server = serve
    archive(folder / "teachers.tar", ["resnet56", "vgg13"], [("cifar_teachers/README", b"x"), ("../../evil_vanilla/x", b"x"),
                                                            ("/tmp/resnet110_vanilla/other.pth", b"x")])
    lines = []
    path, source = find_teacher("resnet56", url=f"{url}/teachers.tar", say=lines.append)
    assert path == checkpoints / "mdistiller" / "resnet56.pth" and "mdistiller" in source
    assert f"{url}/teachers.tar" in lines[0]
    assert find_teacher("vgg13", url=f"{url}/teachers.tar")[0] == checkpoints / "mdistiller" / "vgg13.pth"
    assert len(server.asked) == 1
    assert sorted(os.listdir(checkpoints / "mdistiller")) == ["resnet56.pth", "vgg13.pth"]
    loaded = load_teacher("resnet56", path, source, "cpu")
    written = settled("resnet56")
    repdistiller_teacher(written)       # it made a step
    assert loaded.sha256 == weights_sha256(written)


def test_a_cut_download_leaves_nothing_half_written(checkpoints, serve):
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "vgg13"])
    data = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[:1_000_000])
    path, reason = find_teacher("resnet56", url=f"{url}/cut.tar", say=lambda line: None)
    assert path is None and "could not be downloaded" in reason
    assert os.listdir(checkpoints / "mdistiller") == []


def test_a_teacher_that_came_before_the_line_was_cut_is_taken(checkpoints, serve):
    """Rather than trained here for hours."""
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "vgg13"])
    first = (folder / "whole.tar").read_bytes().find(b"vgg13_vanilla")
    (folder / "cut.tar").write_bytes((folder / "whole.tar").read_bytes()[:first + 100_000])
    path, source = find_teacher("resnet56", url=f"{url}/cut.tar", say=lambda line: None)
    assert path == checkpoints / "mdistiller" / "resnet56.pth" and "mdistiller" in source


@pytest.mark.parametrize("name, place, words", [
    ("resnet56", "/missing.tar", "no checkpoints/resnet56.pt, and mdistiller's teachers could not be downloaded .*404"),
    ("resnet56", "/text.tar", "could not be downloaded"),
    ("resnet56", "/others.tar", "no resnet56 in http"),
    ("resnet20", "/missing.tar", "no checkpoints/resnet20.pt, and mdistiller publishes no resnet20, and pytorch-cifar-models' could not be"),
    ("wrn_16_2", "/missing.tar", "no checkpoints/wrn_16_2.pt, and mdistiller publishes no wrn_16_2$"),
])
def test_no_teacher_says_why(serve, name, place, words):
    folder, url, _ = serve
    (folder / "text.tar").write_text("not an archive")
    archive(folder / "others.tar", ["vgg13"])
    path, reason = find_teacher(name, url=url + place, say=lambda line: None)
    assert path is None
    assert re.search(words, reason), reason


@pytest.fixture
def models(serve, monkeypatch):
    """pytorch-cifar-models' releases with a resnet56 whose SHA-256 its name begins."""
    folder, url, server = serve
    torch.manual_seed(7)
    network, buffer = create_model("resnet56"), io.BytesIO()
    torch.save(network.state_dict(), buffer)
    file = f"cifar100_resnet56-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pt"
    (folder / file).write_bytes(buffer.getvalue())
    monkeypatch.setattr(rooms_teacher, "PYTORCH_CIFAR_MODELS_URL", f"{url}/")
    monkeypatch.setitem(rooms_teacher.PYTORCH_CIFAR_MODELS, "resnet56", (file, 72.63))
    return network, folder / file


def test_without_the_archive_the_next_source_is_tried_and_its_accuracy_said(models, checkpoints, serve):
    network, _ = models
    lines = []
    path, source = find_teacher("resnet56", url=f"{serve[1]}/missing.tar", say=lines.append)
    assert path == checkpoints / "pytorch-cifar-models" / "resnet56.pt" and "pytorch-cifar-models', 72.63 % by its authors" in source
    assert "404" in lines[1] and "downloading pytorch-cifar-models' cifar100_resnet56-" in lines[1]
    assert load_teacher("resnet56", path, source, "cpu").sha256 == weights_sha256(network)
    archive(serve[0] / "teachers.tar", ["resnet56"])        # the archive is back: a run that goes on keeps its teacher
    assert find_teacher("resnet56", url=f"{serve[1]}/teachers.tar", say=lines.append) == (path, source) and len(lines) == 2


def test_a_download_with_another_checksum_is_not_taken(models, checkpoints, serve):
    _, file = models
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    path, reason = find_teacher("resnet56", url=f"{serve[1]}/missing.tar", say=lambda line: None)
    assert path is None and "pytorch-cifar-models' could not be downloaded (invalid hash value" in reason
    assert os.listdir(checkpoints / "pytorch-cifar-models") == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.tar", "http://127.0.0.1:abc/x.tar", "teachers.tar"])
def test_no_network_or_no_address_says_why(url):
    path, reason = find_teacher("resnet56", url=url, say=lambda line: None)
    assert path is None and "could not be downloaded" in reason


def trained(name):
    """A network whose batch norms have seen images, so that folding them is no matter of ones and zeros."""
    torch.manual_seed(0)
    network = create_model(name).train()
    with torch.no_grad():
        for _ in range(3):
            network(normalise(synthetic(64, 3).images))
    return network


@pytest.mark.parametrize("name", ["resnet56", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_a_teachers_logits_are_the_frozen_networks(name):
    network, images = trained(name), normalise(synthetic(5, 1).images)
    before = weights_sha256(network)
    teacher = Teacher(network, "cpu")
    logits = teacher.logits(images.requires_grad_())
    with torch.no_grad():
        expected = network.double().eval()(images.double()).float()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not logits.requires_grad and logits.dtype == torch.float32
    assert weights_sha256(network.float()) == before == teacher.sha256       # no batch norm statistics moved
    left = [m for m in teacher.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert (len(left) == 18) if name == "wrn_40_2" else not left        # those before a convolution cannot be folded into it


def test_bf16_is_for_the_network_not_for_its_logits():
    network, images = trained("resnet8"), normalise(synthetic(5, 1).images)
    whole, half = (Teacher(network, "cpu", precision).logits(images) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.1 * whole.abs().max()


@pytest.fixture
def teacher(tmp_path):
    teacher = Teacher(trained("resnet8"), "cpu")
    teacher.split = synthetic(40, 1)
    teacher.attend(teacher.split, tmp_path / "answers")
    teacher.asked = []

    def logits(images, real=teacher.logits):
        teacher.asked.append(len(images))
        return real(images)

    teacher.logits = logits
    return teacher


def views(n=40, seed=0):
    order, drawn = epoch_draws(seed, 0, n)
    return torch.from_numpy(order), torch.from_numpy(drawn)


def test_answers_are_computed_once_and_are_those_of_the_view(teacher, tmp_path):
    indices, drawn = views()
    first = teacher.answers(indices, drawn)
    images = normalise(crop_and_flip(teacher.split.images[indices], drawn))
    torch.testing.assert_close(first, teacher.network(images).half().float(), rtol=2e-3, atol=1e-3)
    assert torch.equal(first, first.half().float())         # the rounded value, the first time too
    assert teacher.asked == [40]
    assert torch.equal(teacher.answers(indices[7:], drawn[7:]), first[7:]) and teacher.asked == [40]
    other = (drawn + torch.arange(40) % 2) % data.VIEWS     # every second image at another view
    assert torch.equal(teacher.answers(indices, other)[::2], first[::2]) and teacher.asked == [40, 20]
    again = Teacher(trained("resnet8"), "cpu")              # another process with the same weights
    again.attend(teacher.split, tmp_path / "answers")
    again.logits = None
    assert torch.equal(again.answers(indices, drawn), first)


def test_answers_without_a_memory_are_the_same_numbers(teacher, tmp_path):
    indices, drawn = views()
    kept = teacher.answers(indices, drawn)
    teacher.attend(teacher.split, None)
    assert torch.equal(teacher.answers(indices, drawn), kept)
    teacher.attend(teacher.split, tmp_path, exact=True)
    exact = teacher.answers(indices, drawn)
    assert torch.equal(exact.half().float(), kept) and not torch.equal(exact, kept)
    assert torch.equal(teacher.answers(indices, drawn), exact)


@pytest.mark.parametrize("change", ["weights", "data", "precision", "rounding"])
def test_a_memory_is_of_one_teacher_data_and_precision(teacher, tmp_path, change):
    indices, drawn = views()
    kept = teacher.answers(indices, drawn)
    network, split = trained("resnet8"), teacher.split
    if change == "weights":
        network.fc.bias.data += 1
    if change == "data":
        split = synthetic(40, 2)
    other = Teacher(network, "cpu", "bf16" if change == "precision" else "fp32")
    other.attend(split, tmp_path / "answers", exact=change == "rounding")
    assert not torch.equal(other.answers(indices, drawn), kept)
    assert len(os.listdir(tmp_path / "answers")) == 2


def test_a_damaged_answer_is_computed_again(teacher):
    """Half a record, a flipped bit, a lost page: what a kill, a bad disk, or a crash of the machine leaves."""
    indices, drawn = views()
    kept = teacher.answers(indices, drawn)
    path, size = teacher.memory.path, teacher.memory.size
    whole, slots = path.read_bytes(), (indices * data.VIEWS + drawn).sort().values
    for harm in (lambda b, at: b[:at + size // 2], lambda b, at: b[:at + 9] + bytes([b[at + 9] ^ 1]) + b[at + 10:],
                 lambda b, at: b[:at] + bytes(size) + b[at + size:], lambda b, at: b""):
        path.write_bytes(harm(whole, slots[20].item() * size))
        teacher.asked.clear()
        assert torch.equal(teacher.answers(indices, drawn), kept) and sum(teacher.asked) >= 1
        assert path.read_bytes() == whole


def test_two_writers_share_a_memory(teacher, tmp_path):
    indices, drawn = views()
    other = Teacher(trained("resnet8"), "cpu")
    other.attend(teacher.split, tmp_path / "answers")
    first = teacher.answers(indices[:20], drawn[:20])
    both = other.answers(indices, drawn)
    assert torch.equal(both[:20], first)
    teacher.asked.clear()
    assert torch.equal(teacher.answers(indices, drawn), both) and teacher.asked == []


def test_a_disk_without_room_costs_the_memory_not_the_run(teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    teacher.attend(teacher.split, tmp_path / "file")        # no folder can be made there
    indices, drawn = views()
    first = teacher.answers(indices, drawn)
    assert torch.equal(teacher.answers(indices, drawn), first)
    assert capsys.readouterr().out.count("notice: no more of the teacher's answers are kept in") == 1


def test_a_nearly_full_disk_is_left_to_the_saves(teacher, tmp_path, monkeypatch, capsys):
    indices, drawn = views()
    first = teacher.answers(indices[:10], drawn[:10])
    usage = rooms_teacher.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rooms_teacher.shutil, "disk_usage", lambda path: usage._replace(free=rooms_teacher.RESERVE - 1))
    size = teacher.memory.path.stat().st_size
    whole = teacher.answers(indices, drawn)
    assert torch.equal(whole[:10], first) and teacher.memory.path.stat().st_size == size
    assert "nearly full" in capsys.readouterr().out
    monkeypatch.setattr(rooms_teacher.shutil, "disk_usage", lambda path: usage._replace(free=0))
    teacher.attend(teacher.split, tmp_path / "answers")
    assert torch.equal(teacher.answers(indices, drawn), whole) and teacher.memory.path.stat().st_size == 0


def test_logits_that_float16_cannot_hold_are_an_error(tmp_path):
    network = trained("resnet8")
    network.fc.weight.data *= 1e6
    teacher = Teacher(network, "cpu")
    teacher.attend(synthetic(40, 1), tmp_path)
    with pytest.raises(ValueError, match="do not fit float16: give --exact-teacher"):
        teacher.answers(*views())
    teacher.attend(synthetic(40, 1), tmp_path, exact=True)
    assert teacher.answers(*views()).isfinite().all()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "ShuffleV1", "MobileNetV2"])
def test_an_answer_does_not_depend_on_what_else_is_asked(name):
    """What makes a run that goes on, or one that finds half of the answers known, equal to an unbroken one."""
    teacher = Teacher(trained(name), "cpu")
    teacher.attend(synthetic(150, 1))
    indices, drawn = views(150)
    teacher.batch = 64
    whole = teacher.answers(indices, drawn)
    for part in (slice(100, 150), slice(0, 1), slice(3, 140, 7), slice(20, 150)):
        assert torch.equal(teacher.answers(indices[part], drawn[part]), whole[part])


def test_a_teacher_below_the_published_accuracy_is_a_warning():
    split, network = synthetic(100, 1), trained("resnet8")
    top1, line = Teacher(network, "cpu", source="mine.pt").check(split, published=79.42)
    assert f"teacher resnet8 (mine.pt): {top1:.2f} % top-1" in line and "published 79.42" in line and "warning" in line
    assert "warning" not in Teacher(network, "cpu").check(split, published=top1 + 0.9)[1]


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
