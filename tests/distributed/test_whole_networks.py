"""50 steps of the networks of `train` on several ranks: as DDP on dense generators, as one process."""

import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hyperfast
from hyperfast.distributed import data_parallel, unshard_
from train.models import build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

LR = 1e-3


class Run(NamedTuple):
    """way: "dense" (plain PyTorch, torch's optimizer), "factored" or "sharded". rows: of the joined batch."""

    model: str
    way: str
    ranks: int
    steps: int = 50
    rows: int = 8
    adamw: bool = True  # with weight decay and clipping, otherwise Adam without
    dropout: float = 0.5


def train(run: Run, rank: int = 0) -> nn.Module:
    torch.manual_seed(0 if run.ranks == 1 or run.way == "dense" else rank)  # data_parallel starts all equal
    net = build_model(run.model, fused=run.way != "dense").double()
    net.dropout.p = run.dropout
    model = net
    if run.way != "dense":
        model = data_parallel(net, shard_generators=run.way == "sharded")
    elif run.ranks > 1:
        model = DistributedDataParallel(net)
    optimizer = optimizer_of(run, net)
    for step in range(run.steps):
        x, y = batch(run, step)
        own = slice(rank * run.rows // run.ranks, (rank + 1) * run.rows // run.ranks)
        torch.manual_seed(step * run.ranks + rank)  # dropout
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), y[own]).backward()
        if run.way == "dense" and run.adamw:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return unshard_(net) if run.way == "sharded" else net


def optimizer_of(run: Run, net: nn.Module) -> torch.optim.Optimizer:
    if run.way == "dense":
        own = {"fused": True}  # the same rule in less time
        if run.adamw:
            return torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01, **own)
        return torch.optim.Adam(net.parameters(), lr=LR, **own)
    if run.adamw:
        return hyperfast.optim.AdamW(net, lr=LR, weight_decay=0.01, max_grad_norm=1.0)
    return hyperfast.optim.Adam(net, lr=LR)


def batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(run.rows, 3, 32, 32, generator=generator, dtype=torch.float64)
    return x, torch.randint(100, (run.rows,), generator=generator)


def work(rank: int, run: Run, folder: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store_{run.way}", datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=run.ranks, timeout=timeout)
    state = train(run, rank).state_dict()
    for name, t in state.items():
        first = t.clone()
        dist.broadcast(first, 0)
        # every rank has its own batch statistics
        assert "running" in name or torch.equal(t, first), name
    if rank == 0:
        torch.save(state, f"{folder}/{run.way}.pt")
    dist.destroy_process_group()


def state_of(run: Run, folder: Path) -> dict[str, Tensor]:
    """What the first rank has in the end."""
    if run.ranks == 1:
        return train(run).state_dict()
    mp.start_processes(work, (run, str(folder)), nprocs=run.ranks, start_method="spawn")
    path = folder / f"{run.way}.pt"
    state = torch.load(path, mmap=True)
    path.unlink()
    return state


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all parameters and buffers, each relative to its largest element, or to how far 50 steps can move
    one: biases before a batch norm stay at 0 but for rounding, for their gradient is 0."""
    assert list(ours) == list(theirs)
    pairs = ((ours[name], t) for name, t in theirs.items() if t.is_floating_point())
    return max(((a - b).abs().max() / b.abs().max().clamp(min=50 * LR)).item() for a, b in pairs)


def test_full_equals_ddp_on_dense_generators(tmp_path):
    theirs = state_of(Run("full", "dense", ranks=2), tmp_path)
    for way in ("factored", "sharded"):
        difference = largest_difference(state_of(Run("full", way, ranks=2), tmp_path), theirs)
        print(f"{way}: largest relative difference {difference:.1e}")
        assert difference <= 1e-9


@pytest.mark.parametrize(
    ("way", "ranks", "steps"),
    [("factored", 2, 50), ("sharded", 2, 50), ("factored", 4, 5), ("sharded", 4, 5)],
)
def test_all_layers_equals_one_process(way, ranks, steps, tmp_path):
    shared = {"steps": steps, "adamw": False, "dropout": 0.0}
    theirs = train(Run("all_layers", "dense", ranks=1, **shared)).state_dict()
    difference = largest_difference(state_of(Run("all_layers", way, ranks=ranks, **shared), tmp_path), theirs)
    print(f"{way}, {ranks} ranks: largest relative difference {difference:.1e}")
    assert difference <= 1e-9
