"""Where a teacher comes from, and its answers.

A teacher is looked for in this order: the file that was named; checkpoints/NAME.pt; the teachers that mdistiller
publishes, downloaded once into checkpoints/mdistiller/. Where there is none, the training script trains it.
"""

import hashlib
import http.client
import os
import tarfile
import urllib.request
from pathlib import Path, PurePosixPath

import torch

from data import evaluate
from models import create_model, load_weights

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
ARCHIVE_URL = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
IN_ARCHIVE = ("resnet32x4", "resnet56", "resnet110", "wrn_40_2", "vgg13", "ResNet50")
TIMEOUT = 30    # seconds without an answer before a download is given up


class Teacher:
    """A frozen network in evaluation mode; `answers(images)` are its logits.

    network: a module, (B, 3, H, W) -> (B, K). precision: "fp32" or "bf16" (autocast). source: where it comes from.
    """

    def __init__(self, network, device, precision="fp32", source="untrained"):
        self.network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        self.source = source
        self.sha256 = weights_sha256(network)

    @torch.no_grad()
    def answers(self, images):
        """Logits (B, K), float32, of a normalised batch (B, 3, H, W)."""
        with self.autocast:
            return self.network(images).float()

    def check(self, split, published=None):
        """Top-1 (%) on a split, as (top1, line to print); the line warns when it is a point or more under `published`."""
        top1 = evaluate(self.answers, split)["top1"]
        line = f"teacher {self.network.name} ({self.source}): {top1:.2f} % top-1 on the test split"
        if published is not None:
            line += f", published {published:.2f}"
            if top1 <= published - 1:
                line += "\nwarning: this teacher is worse than the published one; the paper's numbers cannot be expected"
        return top1, line


def load_teacher(name, path, source, device, precision="fp32", num_classes=100):
    """The Teacher `name` with the weights of a checkpoint file. ValueError as in `models.load_weights`."""
    network = create_model(name, num_classes)
    load_weights(network, path)
    return Teacher(network, device, precision, source)


def find_teacher(name, checkpoint=None, url=ARCHIVE_URL, say=print):
    """(file, source) of a CIFAR-100 teacher's weights, in the order above; (None, reason) where none was found.

    `url` is the archive of mdistiller's teachers, or a mirror of it; `say` takes a line about a download.
    """
    if checkpoint is not None:
        return Path(checkpoint), str(checkpoint)
    kept, published = CHECKPOINTS / f"{name}.pt", CHECKPOINTS / "mdistiller" / f"{name}.pth"
    if kept.is_file():
        return kept, f"checkpoints/{name}.pt"
    if not published.is_file():
        if name not in IN_ARCHIVE:
            return None, f"no checkpoints/{name}.pt, and mdistiller publishes no {name}"
        try:
            say(f"downloading mdistiller's teachers, once, from {url}")
            download_teachers(url, published.parent)
        except (OSError, ValueError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
            return None, f"no checkpoints/{name}.pt, and mdistiller's teachers could not be downloaded ({error})"
        if not published.is_file():
            return None, f"no checkpoints/{name}.pt, and no {name} in {url}"
    return published, f"mdistiller's, checkpoints/mdistiller/{name}.pth"


def download_teachers(url, folder):
    """Takes NAME_vanilla/ckpt_epoch_240.pth out of the archive, as it comes, to folder/NAME.pth; nothing half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, tarfile.open(fileobj=response, mode="r|*") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            name = path.parent.name.removesuffix("_vanilla")
            if not member.isfile() or path.name != "ckpt_epoch_240.pth" or name not in IN_ARCHIVE:
                continue
            partial = folder / f"{name}.pth.{os.getpid()}.part"
            try:
                partial.write_bytes(archive.extractfile(member).read())
                os.replace(partial, folder / f"{name}.pth")
            finally:
                partial.unlink(missing_ok=True)


def weights_sha256(network):
    """SHA-256 of a network's parameters and buffers, names included; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
