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
from pathlib import Path

import pytest
import torch

import data
import teacher as rooms_teacher
from conftest import forked
from data import crop_and_flip, epoch_draws, normalise, synthetic
from distill import check_teacher
from distributed import World
from models import create_model
from networks import init_bn_stats
from teacher import Cache, Teacher, download_teachers, find_teacher, load_teacher, weights_sha256
from test_weights import repdistiller_teacher


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms_teacher, "CHECKPOINTS", tmp_path / "checkpoints")
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


def test_the_named_file_comes_first(checkpoints):
    checkpoints.mkdir()
    (checkpoints / "resnet56.pt").write_bytes(b"")
    assert find_teacher("resnet56", "mine.pt") == (Path("mine.pt"), "mine.pt")
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


def test_a_cut_download_leaves_nothing_half_written(checkpoints, serve):
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "wrn_40_2"])
    data = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[:1_000_000])
    path, reason = find_teacher("resnet56", url=f"{url}/cut.tar", say=lambda line: None)
    assert path is None and "could not be downloaded" in reason
    assert os.listdir(checkpoints / "mdistiller") == []


def test_a_teacher_that_came_before_the_line_was_cut_is_taken(checkpoints, serve):
    """Rather than trained here for hours."""
    folder, url, _ = serve
    archive(folder / "whole.tar", ["resnet56", "wrn_40_2"])
    first = (folder / "whole.tar").read_bytes().find(b"wrn_40_2_vanilla")
    (folder / "cut.tar").write_bytes((folder / "whole.tar").read_bytes()[:first + 100_000])
    path, source = find_teacher("resnet56", url=f"{url}/cut.tar", say=lambda line: None)
    assert path == checkpoints / "mdistiller" / "resnet56.pth" and "mdistiller" in source


@pytest.mark.parametrize("name, place, words", [
    ("resnet56", "/missing.tar",
     "no checkpoints/resnet56.pt, and mdistiller's teachers could not be downloaded .*404"),
    ("resnet56", "/text.tar", "could not be downloaded"),
    ("resnet56", "/others.tar", "no resnet56 in http"),
    ("resnet20", "/missing.tar",
     "no checkpoints/resnet20.pt, and mdistiller publishes no resnet20, and pytorch-cifar-models' could not"),
    ("wrn_16_2", "/missing.tar", "no checkpoints/wrn_16_2.pt, and mdistiller publishes no wrn_16_2$"),
])
def test_no_teacher_says_why(serve, name, place, words):
    folder, url, _ = serve
    (folder / "text.tar").write_text("not an archive")
    archive(folder / "others.tar", ["wrn_40_2"])
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
    assert path == checkpoints / "pytorch-cifar-models" / "resnet56.pt"
    assert source == ("pytorch-cifar-models', 72.63 % by its authors, "
                      "checkpoints/pytorch-cifar-models/resnet56.pt")
    assert "404" in lines[1] and "downloading pytorch-cifar-models' cifar100_resnet56-" in lines[1]
    assert load_teacher(create_model("resnet56"), path, "cpu", source).sha256 == weights_sha256(network)
    archive(serve[0] / "teachers.tar", ["resnet56"])    # it is back: a run keeps its teacher
    assert find_teacher("resnet56", url=f"{serve[1]}/teachers.tar", say=lines.append) == (path, source)
    assert len(lines) == 2


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
            network(normalise(synthetic(4, 3).images))
    return network


@pytest.mark.parametrize("name", ["resnet56", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "MobileNetV2",
                                  "ShuffleV1", "ShuffleV2"])
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


def test_bf16_is_for_the_network_not_for_its_logits():
    network, images = trained("resnet8"), normalise(synthetic(5, 1).images)
    whole, half = (Teacher(network, "cpu", precision).logits(images) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.1 * whole.abs().max()


@pytest.fixture
def teacher(tmp_path):
    """A teacher that caches its logits for 40 images; `computed` holds the lengths of its batches."""
    teacher = Teacher(trained("resnet8"), "cpu")
    teacher.split = synthetic(40, 1)
    teacher.cache_logits(teacher.split, tmp_path / "logits")
    teacher.computed = []

    def logits(images, real=teacher.logits):
        teacher.computed.append(len(images))
        return real(images)

    teacher.logits = logits
    return teacher


def reopened(teacher):
    """Map the file anew, as another run does."""
    real, teacher.computed = teacher.logits, []
    teacher.logits = lambda images: teacher.computed.append(len(images)) or real(images)
    teacher.cache_logits(teacher.split, teacher.cache.path.parent)
    teacher.computed.clear()
    return teacher


def views(n=40, seed=0):
    order, drawn = epoch_draws(seed, 0, n)
    return torch.from_numpy(order), torch.from_numpy(drawn)


def test_logits_are_computed_once_and_are_those_of_the_view(teacher, tmp_path):
    indices, drawn = views()
    first = teacher.cached_logits(indices, drawn)
    images = normalise(crop_and_flip(teacher.split.images[indices], drawn))
    torch.testing.assert_close(first, teacher.network(images).half().float(), rtol=2e-3, atol=1e-3)
    assert torch.equal(first, first.half().float())         # the rounded value, the first time too
    assert teacher.computed == [40]
    assert torch.equal(teacher.cached_logits(indices[7:], drawn[7:]), first[7:]) and teacher.computed == [40]
    other = (drawn + torch.arange(40) % 2) % data.VIEWS     # every second image at another view
    assert torch.equal(teacher.cached_logits(indices, other)[::2], first[::2])
    assert teacher.computed == [40, 20]
    again = Teacher(trained("resnet8"), "cpu")              # another process with the same weights
    again.cache_logits(teacher.split, tmp_path / "logits")
    again.logits = None
    assert torch.equal(again.cached_logits(indices, drawn), first)


def test_logits_without_a_cache_are_the_same_numbers(teacher, tmp_path):
    indices, drawn = views()
    kept = teacher.cached_logits(indices, drawn)
    teacher.cache_logits(teacher.split, None)
    assert torch.equal(teacher.cached_logits(indices, drawn), kept)
    images = normalise(crop_and_flip(teacher.split.images[indices], drawn))
    assert torch.equal(teacher.cached_logits(indices, drawn, images), kept)
    teacher.cache_logits(teacher.split, tmp_path, exact=True)
    exact = teacher.cached_logits(indices, drawn)
    assert torch.equal(exact.half().float(), kept) and not torch.equal(exact, kept)
    assert torch.equal(teacher.cached_logits(indices, drawn), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_caches_in_its_memory_or_without_room_in_a_file(room, tmp_path, monkeypatch):
    if not room:
        monkeypatch.setattr(rooms_teacher, "SPARE", 2**50)
    teacher, split = Teacher(trained("resnet8"), "cuda"), data.Split(*(x.cuda() for x in synthetic(40, 1)))
    teacher.cache_logits(split, tmp_path)
    indices, drawn = views()
    first = teacher.cached_logits(indices[:30], drawn[:30])
    both = teacher.cached_logits(indices, drawn)
    assert len(os.listdir(tmp_path)) == (0 if room else 1) and torch.equal(both[:30], first) and both.is_cuda
    teacher.cache_logits(split)
    assert torch.equal(teacher.cached_logits(indices, drawn), both)


@pytest.mark.parametrize("change", ["weights", "data", "precision", "rounding"])
def test_a_file_is_of_one_teacher_data_and_precision(teacher, tmp_path, change):
    indices, drawn = views()
    kept = teacher.cached_logits(indices, drawn)
    network, split = trained("resnet8"), teacher.split
    if change == "weights":
        network.fc.bias.data += 1
    if change == "data":
        split = synthetic(40, 2)
    other = Teacher(network, "cpu", "bf16" if change == "precision" else "fp32")
    other.cache_logits(split, tmp_path / "logits", exact=change == "rounding")
    assert not torch.equal(other.cached_logits(indices, drawn), kept)
    assert len(os.listdir(tmp_path / "logits")) == 2


def zeros(content, first, last):
    return content[:first] + bytes(last - first) + content[last:]


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize("harm", [
    lambda file, mark, row: zeros(file, row + 100, row + 200),
    lambda file, mark, row: flip(file, row + 9),
    lambda file, mark, row: flip(file, mark + 2),
    lambda file, mark, row: file[:row] + file[row + 2:row + 4] + file[row:row + 2] + file[row + 4:],
    lambda file, mark, row: zeros(file, row // 4096 * 4096, row // 4096 * 4096 + 4096),
    lambda file, mark, row: zeros(file, mark // 4096 * 4096, mark // 4096 * 4096 + 4096),
    lambda file, mark, row: file[:row],
    lambda file, mark, row: file[:mark],
    lambda file, mark, row: b"",
], ids=["half", "bit", "mark", "words exchanged", "page", "page of marks", "cut", "cut marks", "empty"])
def test_a_damaged_row_is_computed_again(teacher, harm):
    """What a kill, a bad disk, or a crash of the machine leaves."""
    indices, drawn = views()
    kept, path = teacher.cached_logits(indices, drawn), teacher.cache.path
    slot = (indices * data.VIEWS + drawn).sort().values[20].item()
    whole = path.read_bytes()
    path.write_bytes(harm(whole, 8 * slot, len(teacher.cache.marks) * 8 + slot * 200))
    assert torch.equal(reopened(teacher).cached_logits(indices, drawn), kept) and sum(teacher.computed) >= 1
    assert path.read_bytes() == whole
    assert torch.equal(reopened(teacher).cached_logits(indices, drawn), kept) and teacher.computed == []


@pytest.mark.parametrize("dtype, classes", [(torch.float16, 101), (torch.float32, 1000)])
def test_a_checksum_tells_zeros_other_words_and_other_slots(dtype, classes, tmp_path, generator):
    cache = Cache(7, classes, dtype, "cpu", tmp_path / "x.logits")
    slots, words = torch.arange(7), classes * dtype.itemsize // 2
    assert not cache.read(slots)[1].any()                   # nothing was written
    assert (cache.mark(slots, torch.zeros(7, classes, dtype=dtype)) != 0).all()
    assert len(cache.weights.unique()) == words
    row = torch.randn(1, classes, dtype=dtype, generator=generator)
    others = row.repeat(3000, 1).view(torch.int16)
    for other in others[:1000]:                             # one other word
        place = torch.randint(words, (1,), generator=generator)
        other[place] += torch.randint(1, 2**16, (1,), generator=generator)
    for other in others[1000:]:                             # two exchanged
        i, j = torch.randperm(words, generator=generator)[:2]
        other[i], other[j] = other[j].clone(), other[i].clone()
    same = (others == row.view(torch.int16)).all(1)
    zero = torch.zeros(3000, dtype=torch.int64)
    assert torch.equal(cache.mark(zero, others.view(dtype)) == cache.mark(zero[:1], row), same)
    assert same.sum() < 20      # equal words were exchanged
    cache.write(slots[2:4], row.repeat(2, 1))
    assert cache.read(slots)[1].tolist() == [False, False, True, True, False, False, False]
    cache.rows[5], cache.marks[5] = cache.rows[3], cache.marks[3]       # another slot's
    assert not cache.read(slots)[1][5]


def test_two_writers_share_a_file(teacher, tmp_path):
    indices, drawn = views()
    other = Teacher(trained("resnet8"), "cpu")
    other.cache_logits(teacher.split, tmp_path / "logits")
    first = teacher.cached_logits(indices[:20], drawn[:20])
    both = other.cached_logits(indices, drawn)
    assert torch.equal(both[:20], first)
    teacher.computed.clear()
    assert torch.equal(teacher.cached_logits(indices, drawn), both) and teacher.computed == []


def no_folder(monkeypatch, path):
    path.parent.mkdir()
    path.write_text("")


def full_disk(monkeypatch, path):
    usage = shutil.disk_usage("/")._replace(free=rooms_teacher.RESERVE)
    monkeypatch.setattr(rooms_teacher.shutil, "disk_usage", lambda path: usage)


def no_reserving(monkeypatch, path):
    def refuse(*rest):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def another_system(monkeypatch, path):
    monkeypatch.delattr(os, "posix_fallocate")


@pytest.mark.parametrize("problem, words", [
    (no_folder, "File exists"), (full_disk, "the disk is nearly full"),
    (no_reserving, "Operation not supported"), (another_system, "this system cannot reserve the room")])
def test_a_disk_without_room_costs_no_run(teacher, tmp_path, monkeypatch, capsys, problem, words):
    indices, drawn = views()
    first, before = teacher.cached_logits(indices, drawn), teacher.cache
    problem(monkeypatch, tmp_path / "other" / "logits")
    teacher.cache_logits(teacher.split, tmp_path / "other" / "logits")
    assert teacher.cache is None and torch.equal(teacher.cached_logits(indices, drawn), first)
    notice, = capsys.readouterr().out.splitlines()
    assert notice.startswith("notice: the teacher's logits are not cached in ")
    assert notice.endswith(f" ({words}); going on without")
    assert not list(tmp_path.glob("other/logits/*")) and before.read(indices * data.VIEWS + drawn)[1].all()
    if problem is full_disk:        # a file that has its room is used on
        teacher.cache_logits(teacher.split, tmp_path / "logits")
        teacher.computed.clear()
        assert torch.equal(teacher.cached_logits(indices, drawn), first) and teacher.computed == []


def fill(folder):
    """A process that caches one image's logits, fills the disk, and asks for all images' logits."""
    rooms_teacher.RESERVE = -2**30
    one, split = Teacher(create_model("resnet8"), "cpu"), synthetic(40, 1)
    one.logits = lambda images: torch.ones(len(images), 100)
    with open(folder.parent / "output", "w") as output, redirect_stdout(output):
        one.cache_logits(split, folder)
        one.cached_logits(torch.arange(1), torch.arange(1))
        try:
            with open(folder / "other", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError as error:
            print(error)
        indices = torch.arange(40).repeat_interleave(data.VIEWS)
        print(one.cached_logits(indices, torch.arange(data.VIEWS).repeat(40)).sum().item())


@pytest.mark.parametrize("size, notices", [("1m", 1), ("2m", 0)])
def test_a_full_disk_kills_no_run(tmp_path, size, notices):
    """One too small for the file of 1.35 MB, and one that others fill once its room is there: no SIGBUS."""
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
        assert output.count("notice: the teacher's logits are not cached in") == notices
        assert re.search("No space left on device.*\n648000.0\n$", output)
        assert len(list(folder.glob("*.logits"))) == 1 - notices
    finally:
        subprocess.run(["umount", folder], check=True)


def test_logits_that_float16_cannot_hold_are_an_error(tmp_path):
    network = trained("resnet8")
    network.fc.weight.data *= 1e6
    teacher = Teacher(network, "cpu")
    for _ in range(2):      # computed, and read from the file of the run before
        teacher.cache_logits(synthetic(40, 1), tmp_path)
        teacher.cached_logits(*views())
        with pytest.raises(ValueError, match="do not fit float16, which ends at 65504: give --exact-teacher"):
            teacher.check_range()
    teacher.cache_logits(synthetic(40, 1), tmp_path, exact=True)
    assert teacher.cached_logits(*views()).isfinite().all()
    teacher.check_range()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "ShuffleV1", "MobileNetV2"])
def test_logits_do_not_depend_on_what_else_is_computed(name):
    """So that a run that goes on, or one that finds half of the logits cached, equals an unbroken one."""
    teacher = Teacher(trained(name), "cpu")
    teacher.cache_logits(synthetic(50, 1))
    indices, drawn = views(50)
    teacher.batch = 20
    whole = teacher.cached_logits(indices, drawn)
    for part in (slice(30, 50), slice(0, 1), slice(3, 46, 7), slice(8, 50)):
        assert torch.equal(teacher.cached_logits(indices[part], drawn[part]), whole[part])


def test_a_teacher_below_the_published_accuracy_is_a_warning(capsys):
    split, network = synthetic(100, 1), trained("resnet8")
    teacher, batches = Teacher(network, "cpu", source="mine.pt"), [(normalise(split.images), split.targets)]
    top1 = check_teacher(teacher, batches, "test split", World("cpu"), published=79.42)
    line = capsys.readouterr().out
    assert f"teacher resnet8 (mine.pt): {top1:.2f} % top-1 on the test split, published 79.42\n" in line
    assert "warning" in line
    check_teacher(teacher, batches, "test split", World("cpu"), published=top1 + 0.9)
    assert "warning" not in capsys.readouterr().out


def test_the_hash_tells_weights_apart():
    torch.manual_seed(0)
    network = create_model("resnet8")
    before = weights_sha256(network)
    assert before == weights_sha256(network.to(memory_format=torch.channels_last))
    network.bn1.running_mean[0] += 1e-6
    assert before != weights_sha256(network)


def test_download_teachers_ignores_what_it_does_not_know(tmp_path, serve):
    folder, url, _ = serve
    archive(folder / "t.tar", [], [("x/resnet57_vanilla/ckpt_epoch_240.pth", b"x"),
                                   ("x/vgg13_vanilla/last.pth", b"x")])
    download_teachers(f"{url}/t.tar", tmp_path / "to")
    assert os.listdir(tmp_path / "to") == []
