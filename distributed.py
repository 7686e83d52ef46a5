"""The processes of one job under torchrun; without it, one process, and nothing here costs anything."""

import multiprocessing
import os
import sys
import traceback

import click
import torch
import torch.distributed as dist

from cli import pick_device, show
from run import RunError


class World:
    """rank, size, device of a process. Rank 0 prints and writes; small questions go over gloo, on the CPU."""

    def __init__(self, device=None):
        self.rank, self.size, self.group, self.device = 0, 1, None, pick_device(device)
        launched = dist.is_torchelastic_launched()      # not by RANK, which clusters set for other reasons
        if self.device.type == "cuda":
            local, there = int(os.environ["LOCAL_RANK"]) if launched else 0, torch.cuda.device_count()
            if there == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):      # some show each process its own
                local = 0
            if local >= there:
                raise RunError(f"process {local + 1} on this machine finds {there} GPUs: "
                               f"give torchrun --nproc-per-node {there}")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if launched:
            store, self.rank, self.size = next(dist.rendezvous("env://"))
            # the store keeps a dead attempt's keys
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank=self.rank,
                                    world_size=self.size, store=dist.PrefixStore(f"attempt {attempt}", store))
            self.group = dist.new_group(backend="gloo")

    def print(self, line):
        if self.rank == 0:
            click.echo(line)

    def on_main(self, call):
        """What `call` returns in rank 0, for all; its error ends all of them, with one line."""
        value = problem = None
        if self.rank == 0:
            try:
                value = call()
            except (click.ClickException, ValueError) as error:
                problem = error
        if self.group is not None:
            held = [(value, problem is not None)]
            dist.broadcast_object_list(held, 0, group=self.group)
            value, failed = held[0]
            if failed and not problem:
                raise click.exceptions.Exit(1)
        if problem:
            raise problem
        return value

    def any(self, flag):
        """Whether it is so in any process: all save, and all stop, at the same step."""
        if self.group is None:
            return flag
        tensor = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return bool(tensor)

    def sum(self, tensor):
        """The sum over all processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group if tensor.device.type == "cpu" else None)
        return tensor

    def broadcast(self, tensors):
        """Rank 0's values, in every process."""
        for tensor in tensors if self.group is not None else ():
            dist.broadcast(tensor, 0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Leaves the others in peace at the end; with an error at once, as they may wait for this process.

        NCCL's destroy_process_group would wait for them: the reason never printed, nothing ever restarted.
        """
        if self.group is None:
            return
        if error is None:
            dist.destroy_process_group()
            return
        if isinstance(error, KeyboardInterrupt):
            error = click.Abort()
        if isinstance(error, (click.ClickException, click.Abort, click.exceptions.Exit)):
            code = show(error)
        else:
            traceback.print_exception(error)
            code = 1
        for child in multiprocessing.active_children():     # loading processes
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
