"""Teachers are found in the promised order, from a server on this machine; cached logits are right."""

import errno
import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
from contextlib import redirect_stdout

import pytest
import torch

import data
import teacher as teacher_module
from conftest import forked
from data import crop_and_flip, epoch_draws, normalise, synthetic
from models import create_model
from networks import init_bn_stats
from teacher import Teacher, check_teacher, find_teacher, load_teacher, weights_sha256
from test_checkpoints import repdistiller_teacher


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def archive(path, names, extra=()):
    """An archive laid out as mdistiller's, its members as RepDistiller writes a teacher."""
    with tarfile.open(path, "w") as file:
        for name in names:
            add(file, f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth", published(name))
        for name, content in extra:
            add(file, name, content)


@functools.cache
def published(name):
    content = io.BytesIO()
    torch.save(repdistiller_teacher(settled(name)), content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def settled(name):
    """An untrained network whose batch norms know its activations, so that its logits are of a usual size."""
    torch.manual_seed(len(name))
    network = create_model(name)
    with torch.no_grad():
        init_bn_stats(network, torch.rand(8, 3, 32, 32))
    return network


def add(file, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def test_a_file_in_checkpoints_comes_first(checkpoints):
    checkpoints.mkdir()
    (checkpoints / "resnet56.pt").write_bytes(b"")
    assert find_teacher("resnet56") == (checkpoints / "resnet56.pt", "checkpoints/resnet56.pt")


def test_the_archive_is_downloaded_once_and_gives_every_teacher_in_it(checkpoints, serve):
    folder, url, server = serve
    archive(folder / "teachers.tar", ["resnet56", "wrn_40_2"], [
        ("cifar_teachers/README", b"x"), ("../../evil_vanilla/x", b"x"),
        ("/tmp/resnet110_vanilla/other.pth", b"x")])
    lines = []
    path, source = find_teacher("resnet56", url=f"{url}/teachers.tar", say=lines.append)
    assert path == checkpoints / "mdistiller" / "resnet56.pth" and "mdistiller" in source
    assert f"{url}/teachers.tar" in lines[0]
    other, _ = find_teacher("wrn_40_2", url=f"{url}/teachers.tar")
    assert other == checkpoints / "mdistiller" / "wrn_40_2.pth"
    assert len(server.asked) == 1
    assert sorted(os.listdir(checkpoints / "mdistiller")) == ["resnet56.pth", "wrn_40_2.pth"]
    loaded = load_teacher(create_model("resnet56"), path, "cpu", source)
    written = settled("resnet56")
    repdistiller_teacher(written)       # it made a step
    assert loaded.sha256 == weights_sha256(written)


def test_of_a_cut_archive_whole_teachers_are_taken_and_the_rest_can_be_fetched(checkpoints, serve):
    """Rather than trained here for hours; wget -c continues where the line was cut."""
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "wrn_40_2"])
    whole = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[:whole.find(b"wrn_40_2_vanilla") + 100_000])
    lines = []
    path, reason = find_teacher("wrn_40_2", url=f"{url}/cut.tar", say=lines.append)
    place = checkpoints / "cifar_teachers.tar"
    assert path is None and reason == lines[1] and f"wget -c {url}/cut.tar -O {place}" in reason
    assert os.listdir(checkpoints / "mdistiller") == ["resnet56.pth"]
    place.write_bytes(whole)
    path, source = find_teacher("wrn_40_2", url=f"{url}/nowhere.tar", say=lines.append)
    assert path == checkpoints / "mdistiller" / "wrn_40_2.pth" and not place.exists()


@pytest.mark.parametrize("name, url, words", [
    ("resnet110", "/missing.tar", "failed .HTTP Error 404.*: wget -c http.*/missing.tar -O .*teachers.tar$"),
    ("resnet110", "/text.tar", "the download failed"),
    ("resnet110", "/others.tar", "no resnet110 in http"),
    ("resnet20", "/missing.tar", "failed .*wget -c .*cifar100_resnet20-23dac2f1.pt -O .*resnet20.pt$"),
    ("wrn_16_2", "/missing.tar", "no checkpoints/wrn_16_2.pt, and nobody publishes a wrn_16_2$"),
    ("resnet110", "http://127.0.0.1:abc/x.tar", "the download failed"),
])
def test_no_teacher_says_why(serve, name, url, words):
    folder, address, _ = serve
    (folder / "text.tar").write_text("not an archive")
    archive(folder / "others.tar", ["wrn_40_2"])
    path, reason = find_teacher(name, url=address + url if url[0] == "/" else url, say=lambda line: None)
    assert path is None
    assert re.search(words, reason), reason


@pytest.fixture
def models(serve, monkeypatch):
    """pytorch-cifar-models' releases with a resnet56 whose SHA-256 its name begins."""
    folder, url, server = serve
    torch.manual_seed(7)
    network, buffer = create_model("resnet56"), io.BytesIO()
    torch.save(network.state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    file = folder / f"cifar100_resnet56-{digest}.pt"
    file.write_bytes(buffer.getvalue())
    monkeypatch.setattr(teacher_module, "PYTORCH_CIFAR_MODELS_URL", f"{url}/")
    monkeypatch.setitem(teacher_module.PYTORCH_CIFAR_MODELS, "resnet56", digest)
    return network, file


def test_without_the_archive_the_next_source_is_tried(models, checkpoints, serve):
    network, file = models
    lines = []
    path, source = find_teacher("resnet56", url=f"{serve[1]}/missing.tar", say=lines.append)
    assert path == checkpoints / "pytorch-cifar-models" / "resnet56.pt"
    assert source == "checkpoints/pytorch-cifar-models/resnet56.pt"
    assert "404" in lines[1] and lines[2] == f"downloading {serve[1]}/{file.name}, once"
    assert load_teacher(create_model("resnet56"), path, "cpu", source).sha256 == weights_sha256(network)
    archive(serve[0] / "teachers.tar", ["resnet56"])    # it is back: a run keeps its teacher
    assert find_teacher("resnet56", url=f"{serve[1]}/teachers.tar", say=lines.append) == (path, source)
    assert len(lines) == 3


def test_repdistillers_own_file_comes_before_the_archive(checkpoints, serve, monkeypatch):
    """One network's 3 MB, not all of them; with its SHA-256 where that is known."""
    folder, url, server = serve
    (folder / "wrn_40_2.pth").write_bytes(published("wrn_40_2"))
    archive(folder / "teachers.tar", ["wrn_40_2", "resnet32x4"])
    monkeypatch.delenv("TEACHER_URL", raising=False)
    monkeypatch.setattr(teacher_module, "ARCHIVE_URL", f"{url}/teachers.tar")
    monkeypatch.setattr(teacher_module, "REPDISTILLER_URL", f"{url}/{{}}.pth")
    path, source = find_teacher("wrn_40_2")
    assert source == "checkpoints/repdistiller/wrn_40_2.pth" and path.read_bytes() == published("wrn_40_2")
    assert len(server.asked) == 1 and "/wrn_40_2.pth" in server.asked[0]
    (folder / "resnet32x4.pth").write_bytes(published("wrn_40_2"))      # another file than the published one
    path, source = find_teacher("resnet32x4", say=lambda line: None)
    assert source == "checkpoints/mdistiller/resnet32x4.pth"
    assert os.listdir(checkpoints / "repdistiller") == ["wrn_40_2.pth"]


def test_a_download_with_another_checksum_is_not_taken(models, checkpoints, serve):
    _, file = models
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    path, reason = find_teacher("resnet56", url=f"{serve[1]}/missing.tar", say=lambda line: None)
    assert path is None and "the download failed (invalid hash value" in reason
    assert os.listdir(checkpoints / "pytorch-cifar-models") == []


def trained(name):
    """A network whose batch norms have seen images, so that folding them is no matter of ones and zeros."""
    torch.manual_seed(0)
    network = create_model(name).train()
    with torch.no_grad():
        for _ in range(3):
            network(normalise(synthetic(4, 3).images))
    return network


@pytest.mark.parametrize("name", ["wrn_40_2", "vgg13", "ShuffleV2"])
def test_a_teachers_logits_are_the_frozen_networks(name):
    network, images = trained(name), normalise(synthetic(2, 1).images)
    before = weights_sha256(network)
    teacher = Teacher(network, "cpu")
    logits = teacher.logits(images.requires_grad_())
    with torch.no_grad():
        expected = network.double().eval()(images.double()).float()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not logits.requires_grad and logits.dtype == torch.float32
    assert weights_sha256(network.float()) == before == teacher.sha256       # no batch norm statistics moved
    left = [m for m in teacher.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert (len(left) == 18) if name == "wrn_40_2" else not left    # they stand before convolutions


def test_logits_are_float32_until_float16_was_compared():
    """Nor does --precision bf16 change them. A network that float16 overflows keeps float32."""
    images = normalise(synthetic(5, 1).images)
    teacher, other = (Teacher(trained("resnet8"), "cpu", precision) for precision in ("fp32", "bf16"))
    exact = teacher.logits(images)
    assert torch.equal(other.logits(images), exact)
    teacher.allow_half(images)
    half = teacher.logits(images)
    assert teacher.half and half.dtype == torch.float32
    assert 0 < (half - exact).square().mean().sqrt() < 0.02
    network = trained("resnet8")
    network.bn1.weight.data *= 1e6
    network.fc.weight.data *= 1e-6
    overflown = Teacher(network, "cpu")
    exact = overflown.logits(images)
    overflown.allow_half(images)
    assert not overflown.half and torch.equal(overflown.logits(images), exact)


def counted(teacher):
    """The teacher, which notes in `computed` the lengths of its batches."""
    teacher.computed = []

    def logits(images, real=teacher.logits):
        teacher.computed.append(len(images))
        return real(images)

    teacher.logits = logits
    return teacher


@pytest.fixture
def teacher(tmp_path):
    """A teacher that caches its logits for 40 images."""
    teacher = counted(Teacher(trained("resnet8"), "cpu"))
    teacher.split = synthetic(40, 1)
    teacher.cache_logits(teacher.split, tmp_path / "logits")
    return teacher


def views(n=40, seed=0):
    order, drawn = epoch_draws(seed, 0, n)
    return torch.from_numpy(order), torch.from_numpy(drawn)


def asked(teacher, indices, drawn):
    """The teacher's cached logits of views of its images."""
    images = teacher.images[indices.to(teacher.device)]
    return teacher.cached_logits(indices, drawn, normalise(crop_and_flip(images, drawn.to(teacher.device))))


def test_logits_are_computed_once_and_are_those_of_the_view(teacher, tmp_path):
    indices, drawn = views()
    first = asked(teacher, indices, drawn)
    images = normalise(crop_and_flip(teacher.split.images[indices], drawn))
    torch.testing.assert_close(first, teacher.network(images).half().float(), rtol=2e-3, atol=1e-3)
    assert torch.equal(first, first.half().float())         # the rounded value, the first time too
    assert teacher.computed == [40]
    assert torch.equal(asked(teacher, indices[7:], drawn[7:]), first[7:]) and teacher.computed == [40]
    other = (drawn + torch.arange(40) % 2) % data.VIEWS     # every second image at another view
    assert torch.equal(asked(teacher, indices, other)[::2], first[::2])
    assert teacher.computed == [40, 20]
    again = counted(Teacher(trained("resnet8"), "cpu"))     # another process with the same weights
    again.cache_logits(teacher.split, tmp_path / "logits")
    assert torch.equal(asked(again, indices, drawn), first) and again.computed == []


def test_logits_without_a_cache_are_the_same_numbers(teacher, tmp_path):
    indices, drawn = views()
    kept = asked(teacher, indices, drawn)
    teacher.cache_logits(teacher.split, None)
    assert torch.equal(asked(teacher, indices, drawn), kept)
    teacher.cache_logits(teacher.split, tmp_path, exact=True)
    exact = asked(teacher, indices, drawn)
    assert torch.equal(exact.half().float(), kept) and not torch.equal(exact, kept)
    assert torch.equal(asked(teacher, indices, drawn), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_caches_in_its_memory_or_without_room_in_a_file(room, tmp_path, monkeypatch):
    if not room:
        monkeypatch.setattr(teacher_module, "SPARE", 2**50)
    teacher, split = Teacher(trained("resnet8"), "cuda"), data.Split(*(x.cuda() for x in synthetic(40, 1)))
    teacher.cache_logits(split, tmp_path)
    indices, drawn = views()
    first = asked(teacher, indices[:30], drawn[:30])
    both = asked(teacher, indices, drawn)
    assert len(os.listdir(tmp_path)) == (0 if room else 1) and torch.equal(both[:30], first) and both.is_cuda
    teacher.cache_logits(split)
    assert torch.equal(asked(teacher, indices, drawn), both)


@pytest.mark.parametrize("change", ["weights", "data", "precision", "rounding"])
def test_a_file_is_of_one_teacher_data_and_precision(teacher, tmp_path, change):
    indices, drawn = views()
    kept = asked(teacher, indices, drawn)
    network, split = trained("resnet8"), teacher.split
    if change == "weights":
        network.fc.bias.data += 1
    if change == "data":
        split = synthetic(40, 2)
    other = Teacher(network, "cpu")
    other.half = change == "precision"
    other.cache_logits(split, tmp_path / "logits", exact=change == "rounding")
    assert not torch.equal(asked(other, indices, drawn), kept)
    assert len(os.listdir(tmp_path / "logits")) == 2


def test_a_row_is_marked_after_it_is_written(teacher):
    """A process that is killed in between leaves a row that is computed again."""
    indices, drawn = views()
    kept = asked(teacher, indices, drawn)
    teacher.known.zero_()
    teacher.rows.zero_()
    real = teacher.known

    class Killed(BaseException):
        pass

    def mark(slots, value):
        assert torch.equal(teacher.rows[slots].float(), kept)
        raise Killed

    teacher.known = type("Marks", (), {"__getitem__": lambda self, slots: real[slots],
                                       "__setitem__": lambda self, slots, value: mark(slots, value)})()
    with pytest.raises(Killed):
        asked(teacher, indices, drawn)
    teacher.known = real
    assert not real.any() and torch.equal(asked(teacher, indices, drawn), kept)


def test_two_writers_share_a_file(teacher, tmp_path):
    indices, drawn = views()
    other = Teacher(trained("resnet8"), "cpu")
    other.cache_logits(teacher.split, tmp_path / "logits")
    first = asked(teacher, indices[:20], drawn[:20])
    both = asked(other, indices, drawn)
    assert torch.equal(both[:20], first)
    teacher.computed.clear()
    assert torch.equal(asked(teacher, indices, drawn), both) and teacher.computed == []


def full_disk(monkeypatch, path):
    def refuse(*rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def another_system(monkeypatch, path):
    monkeypatch.delattr(os, "posix_fallocate")


@pytest.mark.parametrize("problem, words", [(full_disk, "No space left"),
                                            (another_system, "posix_fallocate")])
def test_a_disk_without_room_costs_no_run(teacher, tmp_path, monkeypatch, capsys, problem, words):
    indices, drawn = views()
    first = asked(teacher, indices, drawn)
    problem(monkeypatch, tmp_path / "other" / "logits")
    teacher.cache_logits(teacher.split, tmp_path / "other" / "logits")
    for _ in range(2):
        assert torch.equal(asked(teacher, indices, drawn), first)
    notice, = capsys.readouterr().out.splitlines()
    assert notice.startswith(f"notice: {tmp_path}/other/logits/resnet8-") and words in notice
    assert notice.endswith(": the teacher's logits are computed in every epoch")
    assert not list(tmp_path.glob("other/logits/*"))


def fill(folder):
    """A process that caches one image's logits, fills the disk, and asks for all images' logits."""
    one, split = Teacher(create_model("resnet8"), "cpu"), synthetic(40, 1)
    one.logits = lambda images: torch.ones(len(images), 100)
    with open(folder.parent / "output", "w") as output, redirect_stdout(output):
        one.cache_logits(split, folder)
        asked(one, torch.arange(1), torch.arange(1))
        try:
            with open(folder / "other", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError as error:
            print(error)
        indices = torch.arange(40).repeat_interleave(data.VIEWS)
        print(asked(one, indices, torch.arange(data.VIEWS).repeat(40)).sum().item())


@pytest.mark.parametrize("size, notices", [("1m", 1), ("2m", 0)])
def test_a_full_disk_kills_no_run(tmp_path, size, notices):
    """One too small for the file of 1.3 MB, and one that others fill once its room is there: no SIGBUS."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        process = forked().Process(target=fill, args=(folder,))
        process.start()
        process.join(200)
        output = (tmp_path / "output").read_text()
        assert process.exitcode == 0, output
        assert output.count("the teacher's logits are computed in every epoch") == notices
        assert re.search("No space left on device.*\n648000.0\n$", output)
        assert len(list(folder.glob("*.logits"))) == 1 - notices
    finally:
        subprocess.run(["umount", folder], check=True)


def test_logits_that_float16_cannot_hold_are_an_error(tmp_path):
    network = trained("resnet8")
    network.fc.weight.data *= 1e6
    teacher = Teacher(network, "cpu")
    for _ in range(2):      # what overflows is not kept
        teacher.cache_logits(synthetic(40, 1), tmp_path)
        with pytest.raises(ValueError, match="do not fit float16, which ends at 65504: give --exact-teacher"):
            asked(teacher, *views())
    teacher.cache_logits(synthetic(40, 1), tmp_path, exact=True)
    assert asked(teacher, *views()).isfinite().all()


def test_logits_do_not_depend_on_what_else_is_computed(name="ShuffleV1"):
    """So that a run that is resumed, or one that finds half of the logits cached, equals an unbroken one."""
    teacher = Teacher(trained(name), "cpu")
    teacher.cache_logits(synthetic(50, 1))
    indices, drawn = views(50)
    teacher.batch = 20
    whole = asked(teacher, indices, drawn)
    for part in (slice(30, 50), slice(0, 1), slice(3, 46, 7), slice(8, 50)):
        assert torch.equal(asked(teacher, indices[part], drawn[part]), whole[part])


def test_a_teacher_below_the_published_accuracy_is_a_warning(capsys):
    teacher = Teacher(trained("resnet8"), "cpu", source="mine.pt")
    check_teacher(teacher, 78.4, "test split", print, published=79.42)
    line, warning = capsys.readouterr().out.splitlines()
    assert line == "teacher resnet8 (mine.pt): 78.40 % top-1 on the test split, published 79.42"
    assert warning.startswith("warning: this teacher is worse")
    check_teacher(teacher, 78.5, "test split", print, published=79.42)
    assert "warning" not in capsys.readouterr().out


def test_the_hash_tells_weights_apart():
    torch.manual_seed(0)
    network = create_model("resnet8")
    before = weights_sha256(network)
    assert before == weights_sha256(network.to(memory_format=torch.channels_last))
    network.bn1.running_mean[0] += 1e-6
    assert before != weights_sha256(network)
