"""One process for each rank of each way to train `full` on several, of one thread each.

`python -m benchmarks.ranks WAY RANK RANKS STORE` is such a process; it answers as `benchmarks.workers` does,
and says what it sends in a step and holds after it.

eager        DDP as users write it: PlainHyperNet, default AdamW, clip_grad_norm_
best         DDP, channels_last, fused AdamW, gradient_as_bucket_view, buffers not broadcast, tuned allocator
best_bf16    the same with DDP's bfloat16 compression hook
factored     hyperfast, data parallel with factored gradients
sharded      hyperfast, sharded generators
main         what `hyperfast.distributed.plan` is told: the main network's forward and backward, without any
             generator, each rank by itself
memory       a copy by all ranks at once
network      an all-reduce
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import hyperfast
from benchmarks.plain import PlainHyperNet
from benchmarks.traffic import held, sent_by
from benchmarks.ways import BATCH, RECIPE
from benchmarks.workers import Comparison, Worker, forget_peak, peak_mib
from hyperfast.distributed import data_parallel
from train.allocator import keep_freed_memory
from train.models import build_model

CLIP = 1.0
COPIED = 2**27  # bytes of what is copied and all-reduced
PROBES = ("main", "memory", "network")


@dataclass
class Trained:
    """model: without its wrapper. step: returns the loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]


def batch(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the joined batch."""
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))
    mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return x[mine], y[mine]


def plain(way: str, rank: int, ranks: int) -> Trained:
    torch.manual_seed(0)
    model, (x, y) = PlainHyperNet(), batch(rank, ranks)
    options = {}
    if way != "eager":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    forward: nn.Module = model
    if ranks > 1:
        forward = DistributedDataParallel(model, **options)
        if way == "best_bf16":
            forward.register_comm_hook(None, bf16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), **RECIPE, fused=None if way == "eager" else True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return Trained(model, optimizer, step)


def ours(way: str, rank: int, ranks: int) -> Trained:
    model = build_model("full", fused=True).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model.load_state_dict(PlainHyperNet().state_dict())
    x, y = batch(rank, ranks)
    x = x.to(memory_format=torch.channels_last)
    forward: nn.Module = model
    if ranks > 1:
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        forward = data_parallel(model, shard_generators=way == "sharded", **options)
    optimizer = hyperfast.optim.AdamW(model, **RECIPE, max_grad_norm=CLIP)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Trained(model, optimizer, step)


def probe(way: str, rank: int, ranks: int) -> Callable[[], Tensor]:
    """A function of which the time of one call is wanted."""
    if way == "main":
        model = build_model("standard_deep", fused=True).to(memory_format=torch.channels_last)
        x, y = batch(rank, ranks)
        x = x.to(memory_format=torch.channels_last)

        def main() -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        return main
    source = torch.ones(COPIED // 4)
    if way == "memory":
        target = torch.empty_like(source)
        return lambda: target.copy_(source)[0]

    def network() -> Tensor:
        dist.all_reduce(source)
        return source.fill_(1.0)[0]

    return network


def serve(way: str, rank: int, ranks: int, store: str) -> None:
    """Does as many steps as each line on stdin says and answers."""
    torch.set_num_threads(1)
    if ranks > 1:
        timeout = datetime.timedelta(seconds=300)  # others start, or take their turn
        options = {"rank": rank, "world_size": ranks, "timeout": timeout}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    trained = None
    if way in PROBES:
        step = probe(way, rank, ranks)
    else:
        trained = (ours if way in ("factored", "sharded") else plain)(way, rank, ranks)
        step = trained.step
    forget_peak()  # making and initialising the model takes more than training
    if way not in ("eager", "memory"):
        keep_freed_memory()
    for line in sys.stdin:
        answer: dict = {"seconds": [], "values": []}

        def steps(count: int = int(line), answer: dict = answer) -> None:
            for _ in range(count):
                start = time.perf_counter()
                value = float(step())
                answer["seconds"].append(time.perf_counter() - start)
                answer["values"].append(value)

        sent = sent_by(steps) / int(line) if ranks > 1 else steps() or 0
        answer |= {"peak_mib": peak_mib(), "sent": sent}
        if trained is not None:
            answer["held"] = held(trained.model, trained.optimizer)
        print(json.dumps(answer), flush=True)


class Ranks:
    """The processes of one way, asked together: a step takes as long as on the slowest, the loss is their
    mean. The rest is the first rank's, but for the peak, of the one with the most."""

    def __init__(self, way: str, ranks: int):
        self.way, self.ranks = way, ranks
        self.folder = tempfile.TemporaryDirectory()
        tuned = str(int(way not in ("eager", "memory")))
        environment = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": tuned}
        self.workers = [
            Worker(way, [sys.executable, "-m", "benchmarks.ranks", *arguments], environment)
            for arguments in (
                [way, str(rank), str(ranks), f"{self.folder.name}/store"] for rank in range(ranks)
            )
        ]
        self.last: dict = {}

    def steps(self, count: int) -> dict:
        for worker in self.workers:
            worker.ask(count)
        answers = [worker.answer(300) for worker in self.workers]
        self.last = answers[0] | {
            "seconds": [max(times) for times in zip(*(a["seconds"] for a in answers), strict=True)],
            "values": [
                sum(values) / self.ranks for values in zip(*(a["values"] for a in answers), strict=True)
            ],
            "peak_mib": max(a["peak_mib"] for a in answers),
        }
        return self.last

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.folder.cleanup()


@dataclass
class RanksComparison(Comparison):
    """`kind` is the number of ranks."""

    def _worker(self, way: str) -> Ranks:
        return Ranks(way, int(self.kind))

    def answer(self, way: str) -> dict:
        """The last one."""
        return next(worker.last for worker in self.workers if worker.way == way)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
