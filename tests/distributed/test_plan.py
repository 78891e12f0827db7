"""The plan of a training step against bytes that ranks really send and tensors that they really hold."""

import datetime
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import hyperfast
from benchmarks.traffic import held, sent_by
from hyperfast.distributed import data_parallel, plan
from hyperfast.distributed.plan import Plan, plans
from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator, SharedCoreGenerator
from hyperfast.nn.generator import generators
from train.models import build_model

WAYS = ("dense", "factored", "sharded")
REST = 4096  # bytes of small messages: barriers, what gloo says of each transfer, the norm


def network() -> nn.Module:
    """Generators with and without bias, heads of a shared core, a kind that stays dense, ordinary layers."""
    core = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 33))
    torch.manual_seed(0)
    return nn.Sequential(
        HyperConv2d(3, 17, 3, z_dim=16),
        nn.BatchNorm2d(17),
        nn.Flatten(),
        HyperLinear(17 * 16, 40, generator=LinearGenerator((40, 17 * 16), 7, bias=False)),
        hyperfast.hyperize(core, SharedCoreGenerator([(60, 40), (33, 60)], hidden_dim=9), init="hyperfan"),
        hyperfast.hyperize(nn.Sequential(nn.Linear(33, 200)), "chunked", init="hyperfan"),
        nn.Linear(200, 300),
    )


def expected(way: str, ranks: int, state_dtype=None) -> Plan:
    found = {p.way: p for p in plans(network(), ranks, state_dtype)}
    return found[way]


def one_way(rank: int, ranks: int, way: str, state_dtype=None) -> None:
    net = hyperfast.factored_(network(), way != "dense")
    ddp = data_parallel(net, shard_generators=way == "sharded", broadcast_buffers=False)
    buckets: list[int] = []

    def counted(group, bucket):
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, counted)
    options = {} if way == "dense" else {"state_dtype": state_dtype}
    optimizer = hyperfast.optim.AdamW(net, lr=1e-3, max_grad_norm=1.0, **options)
    x = torch.randn(2, 3, 6, 6)

    def step() -> None:
        optimizer.zero_grad()
        buckets.clear()
        ddp(x).square().mean().backward()
        optimizer.step()

    for _ in range(2):  # DDP makes its buckets anew after the first
        step()
    sent, wanted = sent_by(step), expected(way, ranks, state_dtype)
    assert abs(sent - wanted.sent) <= 0.01 * wanted.sent + REST, (way, sent, wanted)
    assert sum(buckets) == pytest.approx(wanted.buckets, rel=0.001), (way, buckets, wanted)
    if rank == 0:
        for name, nbytes in held(net, optimizer).items():
            assert nbytes == pytest.approx(getattr(wanted, name), rel=0.002, abs=64), (
                way,
                name,
                nbytes,
                wanted,
            )


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for way in WAYS:
        one_way(rank, ranks, way)
    one_way(rank, ranks, "sharded", "8bit")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.timeout(120)
def test_ranks_send_and_hold_what_the_plan_says(ranks, tmp_path):
    mp.start_processes(work, (ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")


N = 5_009_088  # weights that `full` generates, K = 16, from 8 embeddings; 6,004 ordinary parameters


def test_the_formulas_of_full():
    model = build_model("full")
    dense, factored, sharded = plans(model, 4)
    others = sum(p.nbytes for p in model.parameters()) - 4 * 17 * N
    padded = 4 * sum(-(-math.prod(g.shapes[0]) // 128) * 128 for _, g in generators(model))
    assert dense.sent == 2 * 3 * (4 * 17 * N + others) // 4
    assert factored.sent == 2 * 3 * (4 * N + others) // 4
    assert (sharded.sent_gradients, sharded.sent_weights) == (
        3 * padded // 4 + 3 * others // 2,
        3 * padded // 4,
    )
    assert dense.sent / factored.sent > 16 and dense.sent / sharded.sent > 16
    alone = plans(model, 1)[1]
    assert plans(model, 2)[2].held < 0.55 * alone.held and sharded.held < 0.3 * alone.held
    assert not any(g.factored for _, g in generators(model))  # as it was
    views = plans(model, 4, gradient_as_bucket_view=True)
    assert not any(p.buckets for p in views) and views[0].held == dense.held - dense.gradients


def test_one_rank_sends_nothing():
    for p in plans(network(), 1):
        assert p.sent == p.buckets == 0


def test_seconds():
    _, _, p = plans(network(), 2)
    assert p.seconds(1e9, math.inf) == pytest.approx(p.sent / 1e9)
    assert p.seconds(math.inf, 1e9) == pytest.approx(p.moved / 1e9)
    hidden = p.seconds(
        1e9, math.inf, main=1.0
    )  # what overlaps with the main network's backward costs nothing
    assert hidden == pytest.approx(1 + p.sent_weights / 1e9)


@pytest.mark.parametrize("state_dtype,elements", [(None, 8), (torch.bfloat16, 4), ("8bit", 2 + 8 / 256)])
def test_states(state_dtype, elements):
    net = HyperLinear(64, 64, z_dim=16, bias=False, generator=LinearGenerator((64, 64), 16, bias=False))
    z = 2 * net.generator.z.nbytes
    assert plans(net, 1, state_dtype)[1].states == elements * net.generator.weight.numel() + z


def test_what_is_refused():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        plans(network(), 0)
    with pytest.raises(ValueError, match="state_dtype must be"):
        plans(network(), 2, torch.float16)


def command(capsys, *arguments: str) -> str:
    plan.main(arguments)
    return capsys.readouterr().out


def test_command(capsys):
    options = ["--ranks", "2", "4", "--bandwidth", "1e9", "--memory-bandwidth", "1e11", "--main", "0.1"]
    printed = command(capsys, "--model", "full", *options)
    assert "| sharded | 4 | 30.09 | 15.06 | 15.03 |" in printed and printed.count("| factored |") == 2
    own = command(capsys, "--model", f"{__name__}:network", *options)
    assert own.count("| dense |") == 2
    measured = command(capsys, "--model", f"{__name__}:network", "--ranks", "8", "--bandwidth", "1e9")
    assert "GB/s" in measured and "passing: what" in measured
    header = printed.splitlines()[2].split(" | ")
    assert len(set(header)) == len(header) and "sent: weights" in header and "held: weights" in header


@pytest.mark.parametrize(
    "bandwidth,message", [("400Gb", "'400Gb' is not a number"), ("-1", "must be positive, got -1")]
)
def test_bandwidth_is_a_positive_number(capsys, bandwidth, message):
    with pytest.raises(SystemExit):
        plan.main(["--model", "full", "--ranks", "2", f"--bandwidth={bandwidth}"])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_why_the_models_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "train.models", None)
    with pytest.raises(ValueError, match="'full', cannot be imported: .*train.models.*package.module:call"):
        plan.load("full")


@pytest.mark.parametrize(
    "model,message",
    [
        ("nothing", "unknown model 'nothing'"),
        ("no.such.module:build", "cannot import no.such.module"),
        ("train.models:nothing", "has no callable 'nothing'"),
        ("builtins:list", "made a list, wanted a torch.nn.Module"),
    ],
)
def test_command_refuses_in_one_line(capsys, model, message):
    with pytest.raises(SystemExit):
        plan.main(["--model", model, "--ranks", "2", "--bandwidth", "1e9"])
    assert message in capsys.readouterr().err.splitlines()[-1]
