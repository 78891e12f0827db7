"""Data parallel training of two ranks equals one dense process on the joined batch."""

import copy
import datetime
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook

import hyperfast
from hyperfast.distributed import data_parallel, shard_, unshard_
from hyperfast.nn import (
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    SharedCoreGenerator,
    generate_layers,
    generated_l2_,
)
from hyperfast.nn.generator import generators
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


class Twice(nn.Module):
    """One generator for two layers, generated once and generated anew, and one z for two generators."""

    def __init__(self):
        super().__init__()
        self.a, self.b = HyperLinear(32, 32, z_dim=3), HyperLinear(32, 32, z_dim=3)
        self.b.generator.z = self.a.generator.z

    def forward(self, x):
        x = x.flatten(1)
        (w,), (v,) = hyperfast.nn.generate_together([self.a.generator, self.b.generator])
        return torch.tanh(self.a(torch.tanh(self.a(self.b(x, v), w)), w) + self.a(x))[:, :3]


class Checkpointed(nn.Module):
    """Layers that the backward computes once more: one with its generation, one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = HyperLinear(32, 32, z_dim=3), HyperLinear(32, 3, z_dim=3)

    def forward(self, x):
        (w,) = self.b.generator()
        x = torch.utils.checkpoint.checkpoint(self.a, x.flatten(1), use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(self.b, torch.tanh(x), w, use_reentrant=False)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = (HyperLinear(32, 32, z_dim=3) for _ in range(3))

    def forward(self, x):
        w, v, _ = (w for (w,) in hyperfast.nn.generate_together([m.generator for m in self.children()]))
        return torch.tanh(self.b(torch.tanh(self.a(x.flatten(1), w)), v))[:, :3]


class OfSamples(nn.Module):
    """Weights for each sample, from embeddings that an ordinary layer makes."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Linear(32, 3), HyperLinear(32, 3, z_dim=3)
        self.layer.generator.z.requires_grad_(False)

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x, z=self.embed(x))


def hypernetwork() -> nn.Module:
    """Generated layers, and an ordinary one that `hyperize` generated."""
    return hyperfast.hyperize(Net(), z_dim=2, init="hyperfan")


def shared_core() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    return hyperfast.hyperize(net, SharedCoreGenerator([(8, 32), (3, 8)], hidden_dim=5), init="hyperfan")


def with_a_frozen_generator() -> nn.Module:
    net = hypernetwork()
    net.module.conv.generator.requires_grad_(False)
    return net


def with_a_frozen_embedding() -> nn.Module:
    net = hypernetwork()
    net.module.conv.generator.z.requires_grad_(False)
    return net


def dense_kinds() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    net = hyperfast.hyperize(net, "two_layer", targets=["1"], init="hyperfan")
    return hyperfast.hyperize(net, "chunked", init="hyperfan", chunk_size=10)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


def batch(step: int, rows: int = RANKS * ROWS) -> tuple[Tensor, Tensor]:
    """The joined batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (rows,), generator=generator)


def own(rank: int, step: int) -> tuple[Tensor, ...]:
    return tuple(t[rank * ROWS : (rank + 1) * ROWS] for t in batch(step))


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def assert_equal_states(model: nn.Module, expected: nn.Module, tolerance: float) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def whole(net: nn.Module) -> nn.Module:
    return unshard_(copy.deepcopy(net))


def assert_equal_on_all_ranks(model: nn.Module) -> None:
    for name, t in whole(model).state_dict().items():
        first = t.clone()
        dist.broadcast(first, 0)
        assert torch.equal(t, first), name


def trains_as_one_process(
    rank: int,
    build: Callable[[], nn.Module],
    hook: Callable | None = None,
    factored: bool = True,
    l2: float = 0.0,
    **options,
) -> None:
    """From values that differ between ranks; a step accumulates, the first half without communication."""
    net = generated_l2_(seeded(build, seed=rank), l2)
    dense = generated_l2_(seeded(build, seed=0), l2)
    hyperfast.factored_(net, factored)
    model = data_parallel(net, **options)
    assert_equal_states(whole(net), dense, 0)
    if hook is not None:
        model.register_comm_hook(None, hook)
    optimizer, theirs = AdamW(net, **OPTIONS), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for step in range(STEPS):
        x, y = own(rank, step)
        optimizer.zero_grad()
        if step == 1 and not l2 and not options.get("static_graph"):
            with model.no_sync():
                (loss(model, x[: ROWS // 2], y[: ROWS // 2]) / 2).backward()
            (loss(model, x[ROWS // 2 :], y[ROWS // 2 :]) / 2).backward()
        else:
            loss(model, x, y).backward()
        assert all(f.weight.grad is None for _, g in generators(net) for f in g.factors())
        optimizer.step()
        theirs.zero_grad()
        loss(dense, *batch(step)).backward()
        theirs.step()
    assert_equal_states(whole(net), dense, 1e-9)
    assert_equal_on_all_ranks(net)


def clips_like_one_process(rank: int, folder: str) -> None:
    net = seeded(hypernetwork)
    model = data_parallel(hyperfast.factored_(net))
    optimizer, norms = AdamW(net, **OPTIONS, max_grad_norm=CLIP), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, *own(rank, step)).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.save({"model": net.state_dict(), "norms": norms}, f"{folder}/rank{rank}.pt")


class Convolutions(nn.Module):
    """All weights in one launch; notes when the backward comes to the first layer."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.layers = nn.ModuleList(HyperConv2d(2, 2, 3, padding=1, z_dim=4) for _ in range(5))
        self.events = events

    def forward(self, x):
        for i, (layer, w) in enumerate(zip(self.layers, generate_layers(self).values(), strict=True)):
            x = layer(x, w)
            if not i:
                x.register_hook(lambda _: self.events.append("first layer"))
            x = torch.tanh(x)
        return x


def events_of_a_backward(
    early: bool, l2: float = 0.0, dtype: torch.dtype | None = None, **options
) -> list[str]:
    """Of the second backward: DDP makes its buckets in the order of the first."""
    events: list[str] = []
    net = generated_l2_(hyperfast.factored_(Convolutions(events)), l2)
    model = data_parallel(net, bucket_cap_mb=1e-4, **options)
    for generator in (layer.generator for layer in net.layers):
        generator.early = early

    def hook(state, bucket):
        held = {id(p) for p in bucket.parameters()}
        events.extend(f"dw {i}" for i, m in enumerate(net.layers) if id(m.generator.bias) in held)
        events.extend(f"dz {i}" for i, m in enumerate(net.layers) if id(m.generator.z) in held)
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    for _ in range(2):
        events.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(torch.ones(2, 2, 6, 6))
        y.float().square().mean().backward()
    return events


def sends_while_the_backward_runs(rank: int) -> None:
    backward = [f"dw {i}" for i in (4, 3, 2, 1)]
    l2, autocast = {"l2": 0.1}, {"dtype": torch.bfloat16}
    for way in ({}, l2, autocast, l2 | autocast, {"gradient_as_bucket_view": True}):
        early = events_of_a_backward(True, **way)
        assert early[:6] == [*backward, "first layer", "dw 0"], early
        late = events_of_a_backward(False, **way)
        assert late[0] == "first layer" and sorted(late) == sorted(early), late


def compresses_dw(rank: int) -> None:
    net, dense = seeded(hypernetwork), seeded(hypernetwork)
    model = data_parallel(hyperfast.factored_(net))
    model.register_comm_hook(None, bf16_compress_hook)
    loss(model, *own(rank, 0)).backward()
    loss(dense, *batch(0)).backward()
    pairs = [(net.module.conv.generator, dense.module.conv.generator)]
    for ours, theirs in ((a.bias.grad, b.bias.grad) for a, b in pairs):
        error = (ours - theirs).norm() / theirs.norm()
        assert 1e-4 < error < 1e-2, error


def leaves_unused_layers_out(rank: int) -> None:
    net = seeded(Unused)
    model = data_parallel(hyperfast.factored_(net), find_unused_parameters=True)
    before = copy.deepcopy(net.unused.state_dict())
    optimizer = AdamW(net, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, *own(rank, step)).backward()
        optimizer.step()
    for name in ("generator.weight", "generator.bias", "generator.z", "bias"):
        assert torch.equal(net.unused.state_dict()[name], before[name])
    assert_equal_on_all_ranks(net)


class Uneven(nn.Module):
    """An ordinary layer that is not used on every rank, of a size that fills a socket."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(640, 640), HyperLinear(640, 64), HyperLinear(64, 3)

    def forward(self, x, use):
        weights = generate_layers(self)
        x = x.flatten(1).repeat(1, 20)
        if use:
            x = x + self.stem(x)
        return self.b(torch.tanh(self.a(x, weights["a"])), weights["b"])


def trains_ranks_that_use_different_layers(rank: int) -> None:
    """DDP's buckets and those of the rows are not ready in one order on both."""
    net = seeded(Uneven)
    model = data_parallel(net, shard_generators=True, find_unused_parameters=True)
    assert model.process_group is not dist.group.WORLD
    again = data_parallel(shard_(HyperLinear(2, 2)))  # sharded before
    assert again.process_group is model.process_group
    optimizer = AdamW(net, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = own(rank, step)
        F.cross_entropy(model(x, use=step % 2 == rank), y).backward()
        optimizer.step()
    assert_equal_on_all_ranks(net)


def joins_ranks_with_fewer_batches(rank: int) -> None:
    net, dense = seeded(hypernetwork), seeded(hypernetwork)
    model = data_parallel(hyperfast.factored_(net))
    optimizer, theirs = AdamW(net, **OPTIONS), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    with model.join():
        for step in range(2 if rank else 3):
            optimizer.zero_grad()
            loss(model, *own(rank, step)).backward()
            optimizer.step()
    for step in range(3):
        theirs.zero_grad()
        (loss(dense, *batch(step)) if step < 2 else loss(dense, *own(0, step)) / 2).backward()
        theirs.step()
    assert_equal_states(net, dense, 1e-9)
    net(batch(0)[0])  # what the optimizer generated ahead is forgotten where weights came from another rank
    torch.testing.assert_close(net(batch(0)[0]), dense(batch(0)[0]), rtol=0, atol=1e-9)


def refuses_different_models(rank: int) -> None:
    def net(z_dim: int = 4, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        return nn.Sequential(
            HyperLinear(3, 4, z_dim=z_dim, dtype=dtype, **options), nn.Linear(4, 2, dtype=dtype)
        )

    def frozen() -> nn.Module:
        model = net()
        model[1].bias.requires_grad_(False)
        return model

    two_layer = hyperfast.nn.TwoLayerGenerator((4, 3), 4)
    others = {
        r"parameter 0.generator.weight is .*\[12, 4\].* in rank 0, .*\[12, 5\].* in rank 1": lambda: net(5),
        r"float32 .* in rank 0, .*float64": lambda: net(dtype=torch.float64),
        r"factored=False.* in rank 0, .*factored=True": lambda: hyperfast.factored_(net()),
        r"l2=0.0 in rank 0, .*l2=0.5 in rank 1": lambda: generated_l2_(net(), 0.5),
        r"parameter 0.generator.weight is in rank 0 and not in rank 1": lambda: net(generator=two_layer),
        r"parameter 1.bias is trained.* in rank 0, frozen": frozen,
        r"parameter 0.bias is in rank 0 and not in rank 1": lambda: net(bias=False),
        r"is in rank 1 and not in rank 0": lambda: nn.Sequential(*net(), nn.Linear(2, 2)),
    }
    for pattern, other in others.items():
        with pytest.raises(ValueError, match=pattern) as caught:
            data_parallel(other() if rank else net())
        said: list = [None] * RANKS
        dist.all_gather_object(said, str(caught.value))
        assert said[0] == said[1]
    with pytest.raises(
        ValueError, match="equal models and arguments: argument bucket_cap_mb is 2 in rank 0, 3"
    ):
        data_parallel(net(), bucket_cap_mb=2 + rank)
    with pytest.raises(ValueError, match="in a DistributedDataParallel already"):
        data_parallel(data_parallel(net()))
    with pytest.raises(ValueError, match="takes no mixed_precision: use torch.autocast"):
        data_parallel(net(), mixed_precision=True)
    with pytest.raises(RuntimeError, match="ranks with sharded generators cannot join"):
        data_parallel(net(), shard_generators=True).join()


NETWORKS = {
    "hyperize": hypernetwork,
    "shared core": shared_core,
    "frozen generator": with_a_frozen_generator,
    "frozen embedding": with_a_frozen_embedding,
    "generated twice, z shared": Twice,
    "activation checkpoints": Checkpointed,
    "two-layer, chunked": dense_kinds,
}
WAYS = {
    "dense": {"factored": False},
    "sharded": {"shard_generators": True, "factored": False},
    "L2": {"l2": 0.1},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
    "unused parameters looked for": {"find_unused_parameters": True},
    "hook": {"hook": allreduce_hook},
}


def compiles(rank: int, around: str) -> None:
    """The wrapped model compiled, and a compiled model wrapped."""
    net, dense = seeded(Net), seeded(Net)
    hyperfast.factored_(net)
    model = data_parallel(net) if around == "ddp" else data_parallel(torch.compile(net))
    model = torch.compile(model) if around == "ddp" else model
    optimizer, theirs = AdamW(net, **OPTIONS), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, *own(rank, step)).backward()
        optimizer.step()
        theirs.zero_grad()
        loss(dense, *batch(step)).backward()
        theirs.step()
    assert_equal_states(net, dense, 1e-9)


def compiled_checks(rank: int, folder: str) -> dict[str, Callable[[], None]]:
    return {around: partial(compiles, rank, around) for around in ("ddp", "model")}


def checks(rank: int, folder: str) -> dict[str, Callable[[], None]]:
    """By name; two ranks run them one after the other, for each process imports torch anew."""
    trains = partial(trains_as_one_process, rank)
    named = {f"trains: {name}": partial(trains, build) for name, build in NETWORKS.items()}
    named |= {f"trains: {name}": partial(trains, hypernetwork, **way) for name, way in WAYS.items()}
    named["trains: weights for each sample"] = partial(trains, OfSamples, factored=False)
    others = (
        sends_while_the_backward_runs,
        compresses_dw,
        leaves_unused_layers_out,
        trains_ranks_that_use_different_layers,
        joins_ranks_with_fewer_batches,
        refuses_different_models,
    )
    named |= {check.__name__: partial(check, rank) for check in others}
    named["clips"] = partial(clips_like_one_process, rank, folder)
    return named


def work(rank: int, folder: str, checks: Callable = checks) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    for name, check in checks(rank, folder).items():
        try:
            check()
        except BaseException as error:
            error.add_note(f"in the check {name!r} on rank {rank}")
            raise
    dist.destroy_process_group()


needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@needs_gloo
@pytest.mark.timeout(120)
def test_two_ranks_equal_one_process(tmp_path, plain_twin, assert_equal_parameters):
    mp.start_processes(work, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    net = seeded(hypernetwork)
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


@needs_gloo
@pytest.mark.slow
def test_compiled(tmp_path):
    mp.start_processes(work, (str(tmp_path), compiled_checks), nprocs=RANKS, start_method="spawn")


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="needs a process group: run the program by torchrun"):
        data_parallel(nn.Linear(2, 2))
