"""train_imagenet.py on small folders of real JPEG files, in one process and in two."""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

import data
import distill
import experiment
import networks
import randaugment
import recipes
import zscore_kd
from conftest import forked, run_in
from models import create_model
from train_imagenet import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--data-dir", "images", "--teacher", "resnet14", "--teacher-checkpoint", "teacher.pt",
         "--student", "resnet8", "--size", "32", "--batch-size", "8", "--lr", "0.01", "--device", "cpu",
         "--workers", "0", "--epochs", "1"]


def photos(folder, counts, classes=3):
    """JPEG files of several sizes and kinds; classes differ in colour."""
    draw = np.random.default_rng(0)
    for part, count in counts.items():
        for i in range(count):
            path = folder / part / f"class{i % classes}"
            path.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 128, (40 + i % 5 * 7, 60 - i % 3 * 11, 3), dtype=np.uint8)
            pixels[..., i % classes % 3] += 100
            image = Image.fromarray(pixels)
            image.convert(("RGB", "L", "CMYK")[i % 3 if i > 5 else 0]).save(path / f"{i}.jpg")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "images", {"train": 30, "val": 7})
    torch.manual_seed(0)
    torch.save(create_model("resnet14", 3).state_dict(), "teacher.pt")
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def launch(how, output, *arguments):
    """The real torchrun; what its processes say is in the file `output`."""
    with open(output, "w") as file:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *how.split(),
                                 ROOT / "train_imagenet.py", *arguments], stdout=file,
                                stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def rank_of(rank, size, port, folder, arguments):
    """One process of a job, with the environment that torchrun gives it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.chdir(folder)
    torch.set_num_threads(1)
    with open(f"output{rank}", "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main([str(a) for a in arguments])


def torchrun(*arguments, processes=2, code=0):
    """What the processes of a job print; no launcher, as it would import torch once more for each."""
    port = free_port()
    job = [forked().Process(target=rank_of, args=(rank, processes, port, os.getcwd(), arguments))
           for rank in range(processes)]
    for process in job:
        process.start()
    for process in job:
        process.join(200)
    outputs = [Path(f"output{rank}") for rank in range(processes)]
    text = "".join(path.read_text() for path in outputs)
    for process, path in zip(job, outputs):
        path.unlink()
        process.kill()
    assert [process.exitcode for process in job] == [code] * processes, text
    return text


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method, student, processes", [
    pytest.param("kd", "resnet18", 2, marks=pytest.mark.slow), ("kd", "resnet8", 3), ("ctkd", "resnet8", 2),
    ("mlkd", "resnet8", 2), ("kd", "squeezenet1_1", 2)])
def test_processes_learn_what_one_does_that_accumulates(method, student, processes):
    """The same losses and weights to 1e-5 when one process takes its batches in the same parts, which for
    three are 4, 5 and 5 images. Batch norm's running statistics and MLKD's relations are per replica: the
    former follow rank 0's part alone."""
    batch, part = {2: ("12", "6"), 3: ("14", "5")}[processes]
    flags = [*SMALL, "--method", method, "--zscore", "--student", student, "--size", "64",
             "--batch-size", batch, "--lr", "0.001"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # as each of the two has
    call(*flags, "--micro-batch", part, "--out", "one")
    torch.set_num_threads(threads)
    output = torchrun(*flags, "--out", "two", processes=processes)
    one, two = (torch.load(run_in(out) / "last.pt") for out in ("one", "two"))
    moved = 0.0
    torch.manual_seed(0)
    start = {f"student.{k}": v for k, v in
             networks.create(student, 3, networks.TORCHVISION).state_dict().items()}
    for key, value in one["model"].items():
        if "running" not in key and "tracked" not in key and not key.startswith("temperature"):
            torch.testing.assert_close(two["model"][key], value, rtol=1e-5, atol=1e-5,
                                       msg=lambda m: f"{key}: {m}")
            moved = max(moved, (value - start[key]).abs().max().item())
    assert moved > 3e-4         # thirty times what is allowed
    if method == "ctkd":
        assert two["model"]["temperature.g"].item() == pytest.approx(one["model"]["temperature.g"].item(),
                                                                     abs=1e-6)
    ours, theirs = rows(run_in("one"))[0], rows(run_in("two"))[0]
    for key in ("loss", "ce", "kd", "train_top1"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert f"processes: {processes}" in output and output.count("epoch   1/1") == 1      # rank 0 alone speaks


@pytest.mark.slow       # torchrun's part; the processes are the same as on one
def test_two_nodes_learn_what_two_processes_on_one_do():
    """Two launchers that meet at an address, here on one machine."""
    how = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id job"
    flags = [*SMALL, "--zscore"]
    nodes = [launch(how, f"node{i}", *flags, "--out", "nodes") for i in range(2)]
    ends = [node.wait(200) for node in nodes]
    outputs = [Path(f"node{i}").read_text() for i in range(2)]
    assert ends == [0, 0], outputs
    assert sum("processes: 2" in output for output in outputs) == 1
    torchrun(*flags, "--out", "one")
    same("one", "nodes")


class Views:
    """The images of a run's first epoch, by plain torchvision from the crops that FolderImages drew."""

    def __init__(self, views):
        self.keys, self.places = data.folder_keys(0, 0, 30, 8, 0, 0, 1)
        self.images = data.FolderImages(data.load_folders("images").train, 32, views)
        self.strong = randaugment.strong_draws(0, 0, 30)

    def batch(self, step):
        """[images of each view], targets."""
        t, views, targets = torchvision.transforms, [], []
        normalise = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        for place, key in enumerate(self.keys[step], self.places[step]):
            crops, flips, target, _ = self.images[key]
            if len(crops) == 2:
                crops[1] = randaugment.strong_operations(crops[1][None], self.strong[place:place + 1])[0]
            crops = [crop.flip(2) if flip else crop for crop, flip in zip(crops, flips)]
            views.append([normalise(crop / 255) for crop in crops])
            targets.append(target)
        return [torch.stack(view) for view in zip(*views)], torch.tensor(targets)


@pytest.mark.parametrize("flags", [
    "--method kd", "--method kd --zscore", "--method dkd --zscore", "--method mlkd --zscore",
    "--method wttm", "--method none"])
def test_three_steps_equal_a_plain_loop(flags):
    """The recipe's weights and temperatures, which view enters where, the schedule, written out."""
    call(*SMALL, *flags.split(), "--lr", "0.002")
    torch.manual_seed(0)
    student, frozen = create_model("resnet8", 3), create_model("resnet14", 3)
    start, seen = {k: v.clone() for k, v in student.state_dict().items()}, []
    frozen.load_state_dict(torch.load("teacher.pt"))
    frozen.eval()
    optimizer, views = (torch.optim.SGD(student.parameters(), 2e-3, momentum=0.9, weight_decay=1e-4),
                        Views(2 if "mlkd" in flags else 1))
    for step, rate in enumerate((2e-3, 2e-4, 2e-5)):            # epochs 1, 34 and 67 of 100
        images, y = views.batch(step)
        z, v = [student(x) for x in images], [frozen(x).detach() for x in images]
        ce = sum(torch.nn.functional.cross_entropy(x, y) for x in z)
        loss = {"--method kd": lambda: 0.5 * ce + 0.5 * zscore_kd.kd_loss(z[0], v[0], 1.0, zscore=False),
                "--method kd --zscore": lambda: 0.5 * ce + 9 * zscore_kd.kd_loss(z[0], v[0], 2.0),
                "--method dkd --zscore": lambda: ce + 9 * zscore_kd.dkd_loss(z[0], v[0], y, 2.0, alpha=1.0,
                                                                             beta=0.5),
                "--method mlkd --zscore": lambda: 0.5 * ce + 9 * zscore_kd.mlkd_loss(z[0], v[0], z[1], v[1],
                                                                                     2.0),
                "--method wttm": lambda: ce + 4 * zscore_kd.wttm_loss(z[0], v[0], 5.0),
                "--method none": lambda: ce}[flags]()
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    run = run_in()
    ours, moved, off = torch.load(run / "last.pt")["model"], 0.0, 0.0
    for key, value in student.named_parameters():
        moved = max(moved, (value - start[key]).abs().max().item())
        off = max(off, (value - ours[f"student.{key}"]).abs().max().item())
    # rounding, blown up by batch norms over few images
    assert off < 0.02 * moved and moved > 1e-4, (off, moved)
    assert rows(run)[0]["loss"] == pytest.approx(sum(seen) / 3, rel=1e-3)


def test_imagenet_itself_is_compared_with_the_published_numbers(folder, monkeypatch):
    """A thousand classes, torchvision's weights of the teacher; what the paper and the authors' log say."""
    photo = next((folder / "images" / "train").rglob("*.jpg"))
    for i in range(1000):
        (folder / "imagenet" / "train" / f"n{i:04d}").mkdir(parents=True)
        os.link(photo, folder / "imagenet" / "train" / f"n{i:04d}" / "0.jpg")
    os.symlink("train", folder / "imagenet" / "val")
    torch.manual_seed(0)
    made = torchvision.models.resnet34().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *rest, **more: made)
    output = call("--teacher", "resnet34", "--student", "resnet18", "--zscore", "--size", "32", "--device",
                  "cpu", "--workers", "0", "--epochs", "1")
    assert ("teacher resnet34 (torchvision's IMAGENET1K_V1): 0.10 % top-1 on the val images, published 73.31"
            in output)
    assert "warning: this teacher is worse than the published one" in output
    assert "; published 71.42; last epoch of the authors' log 71.26;" in output
    assert "batch_size 512" in output and "lr 0.2" in output
    alone = {"teacher": None, "student": "resnet18", "method": "none", "zscore": False}
    assert recipes.results_of(alone, "imagenet")["published"] == 69.75


@pytest.mark.parametrize("flags", [
    "--method ctkd", "--method ttm --zscore --precision bf16", "--method dist",
    "--method rld --zscore --entropy-weight"])
def test_a_method_learns_and_is_in_the_students_metadata(flags):
    call(*SMALL, *flags.split())
    folder = run_in()
    row, = rows(folder)
    assert row["loss"] > 0 and row["kd"] > 0
    student = torch.load(folder / "student.pt")
    assert (student["method"] == flags.split()[1] and student["zscore"] == ("--zscore" in flags)
            and student["classes"] == ["class0", "class1", "class2"])
    assert student.get("entropy_temp") == (2.0 if "--entropy-weight" in flags else None)


def test_accuracy_is_exact_when_images_do_not_divide(folder):
    torch.manual_seed(1)
    torch.save(create_model("resnet8", 3).state_dict(), "student.pt")
    flags = ["--data-dir", "images", "--eval", "student.pt", "--student", "resnet8", "--size", "64",
             "--device", "cpu", "--workers", "0"]
    line = re.search("resnet8: .*", call(*flags))[0]
    assert "on the 7 val images" in line
    for processes in (2, 3):
        assert re.search("resnet8: .*", torchrun(*flags, processes=processes))[0] == line
    # and it is what the field computes: shorter side 8/7 of the crop, its centre
    samples = torchvision.datasets.ImageFolder("images/val").samples
    network, hits = create_model("resnet8", 3).eval(), 0
    network.load_state_dict(torch.load("student.pt"))
    t = torchvision.transforms
    view = t.Compose([t.Resize(73), t.CenterCrop(64), t.ToTensor(),
                      t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    with torch.no_grad():
        for path, target in samples:
            hits += network(view(Image.open(path).convert("RGB"))[None]).argmax().item() == target
    assert f"{100 * hits / 7:.2f} top-1" in line


def workers_of(launcher):
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()
            and (p / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(launcher.pid)
            and b"train_imagenet" in (p / "cmdline").read_bytes()]


@pytest.fixture
def stopped(monkeypatch):
    """A context in which a run is asked to stop when it evaluates its student."""
    def evaluate(*rest, real=distill.evaluate):
        if len(rest) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*rest)

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(distill, "evaluate", evaluate)
            yield
    return context


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank, number", [
    (0, signal.SIGTERM), pytest.param(1, signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_worker_costs_one_save_a_signal_stops_all_and_another_number_resumes(rank, number, stopped):
    """torchrun starts all processes again after a kill, and hands a signal to their process groups, loading
    processes included. Epochs are many: no machine is so fast that the run ends before it is stopped."""
    flags = [*SMALL[:-1], "1000", "--zscore"]
    process = launch("--standalone --nproc-per-node 2 --max-restarts 1", "output", *flags, "--workers", "1")
    until = time.monotonic() + 100

    def output(pattern):
        while not (found := re.search(pattern, text := Path("output").read_text())):
            assert time.monotonic() < until and process.poll() is None, text
            time.sleep(0.05)
        return [int(x) for x in found.groups()]

    output("\nepoch +2/")
    victims = [pid for pid in workers_of(process)
               if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(victims) == 1
    folder = run_in()
    try:
        saved = torch.load(folder / "last.pt")
    except FileNotFoundError:       # between a save's two renames
        saved = torch.load(folder / "previous.pt")
    os.kill(victims[0], signal.SIGKILL)     # rank 0 has the run's folder; both have loading processes
    epoch, step, trained = output(r"(?s)resuming from epoch (\d+), step (\d+).*?\nepoch +(\d+)/")
    assert (saved["epoch"], saved["step"]) <= (epoch, step) and trained > epoch
    process.send_signal(number)
    begun = time.monotonic()
    assert process.wait(60) != 0 and time.monotonic() - begun < 30
    assert "stopped, and saved in" in Path("output").read_text()
    state = torch.load(folder / "last.pt")
    assert state["epoch"] >= trained
    with stopped():
        text = call(*flags, code=1)
    assert ("processes was 2, now 1" in text
            and f"resuming from epoch {state['epoch']}, step {state['step']}" in text)
    assert [r["epoch"] for r in rows(folder)] == list(range(1, state["epoch"] + 1))
    on = torch.load(folder / "last.pt")
    assert (on["epoch"], on["step"]) == (state["epoch"], 3)


def test_a_killed_run_ends_with_an_unbroken_runs_bits(killed, student="squeezenet1_1"):
    """With dropout, which draws from torch's own generator."""
    flags = [*SMALL[:-1], "2", "--zscore", "--student", student]
    call(*flags, "--out", "whole")
    with killed():
        CliRunner().invoke(main, [*flags, "--save-every", "1e-9", "--out", "broken"], catch_exceptions=False)
    assert "resuming from epoch 1, step 2" in call(*flags, "--out", "broken")
    same("whole", "broken")


def same(*folders):
    whole, broken = (torch.load(run_in(out) / "last.pt")["model"] for out in folders)
    assert all(map(torch.equal, whole.values(), broken.values()))
    strip = [[{k: v for k, v in r.items() if k not in ("img_s", "seconds")} for r in rows(run_in(out))]
             for out in folders]
    assert strip[0] == strip[1]


def test_a_signal_in_the_evaluation_costs_no_training(stopped):
    """On ImageNet an evaluation takes minutes, longer than schedulers wait."""
    flags = [*SMALL, "--zscore"]
    call(*flags, "--out", "whole")
    with stopped():
        assert "stopped, and saved" in call(*flags, "--out", "broken", code=1)
    assert "resuming from epoch 0, step 3" in call(*flags, "--out", "broken")
    same("whole", "broken")


def test_folders_of_one_name_with_other_images_are_other_runs(folder):
    call(*SMALL, "--zscore")
    photos(folder / "elsewhere" / "images", {"train": 29, "val": 7})
    output = call(*SMALL, "--zscore", "--data-dir", "elsewhere/images", code=1)
    assert "holds a run of another recipe (images was 30 and 7 of 3 classes" in output


def test_a_clusters_variables_alone_make_no_processes(monkeypatch):
    """Some set RANK and WORLD_SIZE for every job; without torchrun there is one process, with all images."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "30 and 7 of 3 classes, "  in call(*SMALL, "--zscore")


def test_batches_do_not_depend_on_the_number_of_processes():
    whole, places = data.folder_keys(3, 1, 100, 24, 1, 0, 1)
    assert places == [24, 48, 72] and all(len(k) == 24 for k in whole)      # the incomplete batch is left out
    for world in (2, 3, 5, 7):
        keys = [data.folder_keys(3, 1, 100, 24, 1, rank, world)[0] for rank in range(world)]
        sizes = [len(share[0]) for share in keys]
        assert max(sizes) - min(sizes) <= 1
        assert [sum(step, []) for step in zip(*keys)] == whole


def test_random_crops_have_torchvisions_distribution():
    torch.manual_seed(0)
    ours = np.array([data.random_box(500, 375, random.Random(i)) for i in range(4000)])
    theirs = np.array([torchvision.transforms.RandomResizedCrop.get_params(
        Image.new("RGB", (500, 375)), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])[:, [1, 0, 3, 2]]
    assert ((ours[:, 0] + ours[:, 2] <= 500).all() and (ours[:, 1] + ours[:, 3] <= 375).all()
            and ours.min() >= 0)
    for a, b in zip(ours.T, theirs.T):
        assert max(abs(np.quantile(a, q) - np.quantile(b, q)) for q in (0.1, 0.3, 0.5, 0.7, 0.9)) < 15
    assert data.random_box(2000, 100, random.Random(0))[2:] == (133, 100)    # too wide to crop: the centre


def test_undecodable_images_are_named_and_replaced_in_training_and_an_error_in_evaluation(folder):
    bad = next((folder / "images" / "train").rglob("4.jpg"))
    bad.write_bytes(bad.read_bytes()[:300])
    flags = [*SMALL, "--zscore", "--batch-size", "10"]      # every image is drawn
    output = call(*flags)
    assert f"notice: {bad.relative_to(folder)} cannot be decoded; another image takes its place" in output
    assert len(rows(run_in())) == 1
    for name in ("5.jpg", "6.jpg", "7.jpg"):
        next((folder / "images" / "train").rglob(name)).write_bytes(b"no image")
    assert "2 of 30 training images cannot be decoded" in call(*flags, "--seed", "1", code=1).splitlines()[-1]
    assert "2 of 30 training images cannot be decoded" in torchrun(*flags, "--seed", "1", code=1)
    photos(folder / "images", {"train": 30})
    next((folder / "images" / "val").rglob("3.jpg")).write_bytes(b"no image")
    output = call(*flags, "--seed", "2", code=1)
    assert ("1 evaluation images cannot be decoded, for instance images/val/class0/3.jpg"
            in output.splitlines()[-1])
    output = torchrun(*flags, "--seed", "2", code=1)
    assert (output.count("1 evaluation images cannot be decoded") == 1
            and output.count("another process was lost") == 1)


def test_an_evaluation_image_too_narrow_to_be_resized_is_named(folder):
    """Its shorter side becomes 37 pixels, its longer one would fill the memory."""
    Image.new("RGB", (1, 200_000)).save(next((folder / "images" / "val").rglob("3.jpg")), "PNG")
    output = call(*SMALL, "--zscore", "--workers", "1", code=1)
    assert ("1 evaluation images cannot be decoded, for instance images/val/class0/3.jpg"
            in output.splitlines()[-1]) and "Traceback" not in output


def test_a_folder_of_nothing_but_damage_is_one_line(folder):
    for path in (folder / "images" / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert ("of 30 training images cannot be decoded"
            in call(*SMALL, "--zscore", "--workers", "1", code=1).splitlines()[-1])


@pytest.mark.parametrize("words, code, flags", [
    ("--student resnet9: no such network; known, the nearest first: resnet", 2, "--student resnet9"),
    ("--student teacher.pt is a file: give it to --student-checkpoint", 2, "--student teacher.pt"),
    ("teacher.pt is for 3 classes, this resnet14 is for 4", 1, "--data-dir four"),
    ("alexnet does not take images of 32 x 32 pixels (", 1, "--student alexnet"),
    ("alexnet does not take images of 32 x 32 pixels (", 1, "--eval alexnet.pt --student alexnet"),
])
def test_mistakes_are_one_line(folder, words, code, flags):
    photos(folder / "four", {"train": 30, "val": 8}, classes=4)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.alexnet(num_classes=3).state_dict().items()}
    torch.save({k: torch.zeros(1).expand(shape) for k, shape in shapes.items()}, "alexnet.pt")
    output = call(*SMALL, *flags.split(), code=code)
    assert words in output.splitlines()[-1] and "Traceback" not in output
    assert not list(Path().rglob("last.pt"))


def test_a_lost_loading_process_is_one_line(monkeypatch):
    """A container's 64 MB of shared memory do not hold a batch."""
    def lost(*rest, **more):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                           "dataloader's workers are out of shared memory.")

    monkeypatch.setattr(experiment, "train", lost)
    assert ("a loading process was lost: give fewer --workers"
            in call(*SMALL, "--zscore", code=1).splitlines()[-1])


@pytest.mark.parametrize("workers", [0, 3])
def test_loading_processes_live_on_and_each_epoch_has_its_own_images(workers):
    """The same images whatever the number of loading processes, which are forked once."""
    dataset, keys = data.FolderImages(data.load_folders("images").train, 32, 1), []
    loader, alive = data.folder_batches(dataset, keys, workers), set()
    for epoch in range(3):
        keys[:], _ = data.folder_keys(0, epoch, 30, 8, epoch, 0, 1)
        for batch, (images, _, target, _) in zip(keys, loader, strict=True):
            expected = [dataset[key] for key in batch]
            assert (torch.equal(images, torch.stack([x[0] for x in expected]))
                    and target.tolist() == [x[2] for x in expected])
        alive |= {child.pid for child in multiprocessing.active_children()}
    assert len(alive) == workers


def test_a_loading_process_that_says_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(data, "WAIT", 1)
    monkeypatch.setattr(data.FolderImages, "__getitem__", lambda *rest: time.sleep(60))
    assert ("--shm-size (DataLoader timed out after 1 seconds)"
            in call(*SMALL, "--zscore", "--workers", "1", code=1).splitlines()[-1])


def test_dry_run_walks_the_whole_path_alone_and_in_two_processes(folder):
    before = sorted(os.listdir(folder))
    flags = ["--teacher", "squeezenet1_1", "--student", "resnet8", "--dry-run", "--device", "cpu"]
    assert "dry run: all is well" in call(*flags)
    assert torchrun(*flags).count("dry run: all is well") == 1
    # the user's teacher, of more classes than the synthetic images
    torch.save(torchvision.models.squeezenet1_1().state_dict(), "imagenet.pt")
    output = call(*flags, "--teacher-checkpoint", "imagenet.pt")
    assert "dry run: all is well" in output and "16 and 8 of 1000 classes" in output
    os.remove("imagenet.pt")
    assert sorted(os.listdir(folder)) == before


def test_real_images_are_read_and_learnt_from(shared, folder):
    for part in ("train", "val"):
        (folder / "sample" / part).mkdir(parents=True)
        for one in sorted((shared / "imagenet-sample").glob("n*"))[:10]:
            os.symlink(one, folder / "sample" / part / one.name)
    torch.save(create_model("resnet14", 10).state_dict(), "teacher.pt")
    flags = [*SMALL, "--zscore", "--data-dir", "sample", "--size", "64", "--workers", "1"]
    output = call(*flags)
    assert ("10 and 10 of 10 classes" in output
            and "; published" not in output)        # which are of 1000
    found = torch.load(run_in() / "student.pt")
    assert found["classes"][0] == "n01440764" and found["num_classes"] == 10
    row, = rows(run_in())
    assert row["loss"] > 1 and 0 <= row["val_top1"] <= 100


def test_list_prints_recipes_and_published_numbers():
    output = call("--list")
    assert "71.42" in output and "90.29" in output and "72.18" in output and "NOTES.md" in output
