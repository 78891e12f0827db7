"""Two DDP ranks with factored gradients equal one dense process on the joined batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hyperfast
from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator, generate_layers
from hyperfast.optim import AdamW

RANKS, STEPS, ROWS, CLIP = 2, 3, 4, 0.5
OPTIONS = {"lr": 1e-2, "weight_decay": 0.05}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = HyperConv2d(2, 3, 3, z_dim=4)
        self.fc = HyperLinear(12, 5, generator=LinearGenerator((5, 12), 3, bias=False, init="hyperfan"))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        if isinstance(self.conv, HyperConv2d):
            weights = generate_layers(self)
            x = torch.tanh(self.conv(x, weights["conv"])).flatten(1)
            return self.out(torch.tanh(self.fc(x, weights["fc"])))
        return self.out(torch.tanh(self.fc(torch.tanh(self.conv(x)).flatten(1))))


def hypernetwork() -> nn.Module:
    """Generated layers, and an ordinary one that `hyperize` generated."""
    return hyperfast.hyperize(Net().double(), z_dim=2, init="hyperfan")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The joined batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(RANKS * ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (RANKS * ROWS,), generator=generator)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    net = hypernetwork()
    net.load_state_dict(torch.load(f"{folder}/start.pt"))  # factored weights must start equal on all ranks
    hyperfast.factored_(net)
    model = DistributedDataParallel(net)
    optimizer = AdamW(net, **OPTIONS, max_grad_norm=CLIP)
    norms = []
    for step in range(STEPS):
        x, y = (t[rank * ROWS : (rank + 1) * ROWS] for t in batch(step))
        optimizer.zero_grad()
        if step == 1:  # accumulate two microbatches, the first without communication
            with model.no_sync():
                (loss(model, x[: ROWS // 2], y[: ROWS // 2]) / 2).backward()
            (loss(model, x[ROWS // 2 :], y[ROWS // 2 :]) / 2).backward()
        else:
            loss(model, x, y).backward()
        for _, generator in hyperfast.nn.named_generators(net):
            assert generator.weight.grad is None
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.save({"model": net.state_dict(), "norms": norms}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one_process(tmp_path, plain_twin, assert_equal_parameters):
    net = hypernetwork()
    nn.init.normal_(net.module.conv.generator.z, std=0.3)
    torch.save(net.state_dict(), tmp_path / "start.pt")
    mp.start_processes(work, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    twin = plain_twin(net)
    optimizer, norms = torch.optim.AdamW(twin.parameters(), **OPTIONS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(twin, *batch(step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP).item())
        optimizer.step()
    for rank in ranks:
        ours = copy.deepcopy(net)
        ours.load_state_dict(rank["model"])
        assert_equal_parameters(ours, twin, 1e-9)
        assert rank["norms"] == pytest.approx(norms, rel=1e-9)
        assert all(torch.equal(t, ranks[0]["model"][name]) for name, t in rank["model"].items())
