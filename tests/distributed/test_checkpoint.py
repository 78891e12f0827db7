"""Checkpoints of one, two and four ranks load into each other bit for bit, and no failure loses one."""

import copy
import datetime
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn

import hyperfast
from hyperfast.distributed import ShardedRows, checkpoint, data_parallel, load, rows, save, shard_, whole
from hyperfast.distributed.agreement import gather_values
from hyperfast.nn import HyperLinear, LinearGenerator, SharedCoreGenerator, TwoLayerGenerator
from hyperfast.optim import SGD, AdamW

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.timeout(240),
]
STORAGES = (None, torch.bfloat16, "8bit")
VALUES = {"epoch": 3, "history": [0.5, None, {"best": (1, 2.5)}], "order": torch.arange(5)}


class Net(nn.Module):
    """Generators of every kind: of odd sizes, without bias, of fewer rows than two ranks' shares, of which
    the bias alone is trained."""

    def __init__(self, z_dim=4):
        super().__init__()
        self.fc = HyperLinear(12, 11, z_dim=z_dim)
        self.bare = HyperLinear(7, 5, generator=LinearGenerator((5, 7), 3, bias=False, init="hyperfan"))
        self.small = HyperLinear(3, 2, z_dim=17)
        self.fixed = HyperLinear(9, 8, z_dim=2)
        self.fixed.generator.weight.requires_grad_(False)
        self.core = SharedCoreGenerator([(4, 33), (3, 3)], z_dim=2, hidden_dim=6)
        self.units = TwoLayerGenerator([(4, 2, 3, 3)], z_dim=3, hidden_dim=2)
        self.norm = nn.BatchNorm1d(3)


def started(seed: int, shard: bool, make=AdamW, **options):
    """A model with factored gradients and its optimizer, other values for every seed."""
    torch.manual_seed(seed)
    net = Net(**{name: options.pop(name) for name in ("z_dim",) if name in options})
    net = shard_(net) if shard else hyperfast.factored_(net)
    return net, make(net, lr=0.05, **options)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step with random gradients, which are those of `number`; of its rows on a rank of a sharded net."""
    random = torch.Generator().manual_seed(number)
    carried = set()
    for g in net.modules():
        if isinstance(g, LinearGenerator):
            dw = torch.randn(g.shapes[0].numel(), generator=random)
            g.gradient_bias.grad = dw if g.shard is None else dw[g.shard.own].clone()
            carried |= {id(g.weight), id(g.gradient_bias)}
            if not isinstance(g.z, nn.Parameter):  # of a head: what the core made
                g.z = torch.randn(g.z.shape, generator=random)
    for p in net.parameters():
        if id(p) not in carried:
            p.grad = torch.randn(p.shape, generator=random)
    optimizer.step()
    net.norm.running_mean += number


def state(net, optimizer) -> dict:
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def assert_same(one, two, path="state"):
    """Equal bit for bit."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert list(one) == list(two), path
        for key in one:
            assert_same(one[key], two[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), path
    else:
        assert one == two, path


def refusal(action, *args, **options) -> str:
    """What every rank says, which must be the same."""
    with pytest.raises(ValueError) as caught:
        action(*args, **options)
    messages = gather_values(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


def join(rank: int, ranks: int, store: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    method = f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks, timeout=timeout)


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, f"{folder}/store{ranks}")
    folder = Path(folder)
    for storage in STORAGES:
        goes_through(folder, ranks, storage)
    passes_in_blocks(folder, ranks)
    saves_for_the_ranks_of_ddp(folder)
    loads_into_sharded_modules(folder)
    refuses_what_does_not_fit(folder, ranks)
    dist.destroy_process_group()


def goes_through(folder: Path, ranks: int, storage) -> None:
    """From one process to these ranks, from these on, and from these to themselves."""
    net, optimizer = started(1, True, state_dtype=storage)
    assert_same(load(folder / f"one-{storage}", net, optimizer), VALUES)
    gathered = whole(state(net, optimizer), to=ranks - 1)
    if dist.get_rank() == ranks - 1:
        assert_same(gathered, torch.load(folder / f"one-{storage}.pt"))
    else:
        assert gathered is None
    step(net, optimizer, 2)
    place = folder / f"ranks{ranks}-{storage}"
    save(place, net, optimizer, **VALUES)
    gathered = whole(state(net, optimizer))
    if gathered is not None:
        torch.save(gathered, folder / f"ranks{ranks}-{storage}.pt")
    again, other = started(2, True, state_dtype=storage)
    load(place, again, other)
    step(net, optimizer, 3)
    step(again, other, 3)
    assert_same(whole(state(again, other), to=None), whole(state(net, optimizer), to=None))


def passes_in_blocks(folder: Path, ranks: int) -> None:
    """Tensors in many blocks, read on another grid than that of the saved ones; through wrappers."""
    place, default = folder / f"blocks{ranks}", rows.BLOCK_BYTES
    net, optimizer = started(2, True)
    step(net, optimizer, 3)
    for of_saved, of_loaded in ((400, 600), (default, 400)):
        rows.BLOCK_BYTES = of_saved
        save(place, nn.parallel.DistributedDataParallel(net), optimizer)
        rows.BLOCK_BYTES = of_loaded
        again, other = started(3, True)
        load(place, again, other)
        gathered = whole(state(again, other))
        rows.BLOCK_BYTES = default
        assert_same(gathered, whole(state(net, optimizer)))


def saves_for_the_ranks_of_ddp(folder: Path) -> None:
    """Of one rank alone, while the others go on."""
    if dist.get_rank() == 0:
        alone = dist.new_group([0], use_local_synchronization=True)
        net, again = (nn.parallel.DistributedDataParallel(nn.Linear(2, 2), process_group=alone) for _ in "12")
        save(folder / "alone", net)
        load(folder / "alone", again)
        assert_same(again.state_dict(), net.state_dict())
        remove(folder / "alone")


def loads_into_sharded_modules(folder: Path) -> None:
    """state_dict and load_state_dict of rows of ranks, of whole tensors, and by torch's functions alone."""
    net, optimizer = started(5, True)
    step(net, optimizer, 6)
    kept = net.fc.generator.weight
    gathered = whole(state(net, optimizer), to=None)
    for given in (gathered, copy.deepcopy(state(net, optimizer))):
        again, other = started(7, True)
        weight = again.fc.generator.weight
        again.load_state_dict(given["model"])
        other.load_state_dict(given["optimizer"])
        assert again.fc.generator.weight is weight
        assert_same(whole(state(again, other), to=None), gathered)
    place = folder / "torch_alone"
    dcp.save({"net": net.state_dict()}, checkpoint_id=place)
    target = {"net": started(8, True)[0].state_dict()}
    dcp.load(target, checkpoint_id=place)
    assert_same(whole(target["net"], to=None), gathered["model"])
    assert net.fc.generator.weight is kept

    plain, its = started(9, False)
    with pytest.raises(RuntimeError, match="hyperfast.distributed.whole"):
        plain.load_state_dict(net.state_dict())
    with pytest.raises(
        ValueError, match="exp_avg of parameter 1: rows of one rank.*hyperfast.distributed.whole"
    ):
        its.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError, match="cannot be pickled: save with hyperfast.distributed.save"):
        torch.save(net.state_dict(), folder / "never.pt")
    with pytest.raises(RuntimeError, match="fc.generator.weight: 132 rows wanted, got shape .131, 4."):
        net.load_state_dict(gathered["model"] | {"fc.generator.weight": torch.zeros(131, 4)})
    with pytest.raises(TypeError, match="needs whole tensors"):
        net.state_dict()["fc.generator.weight"].sum()


def refuses_what_does_not_fit(folder: Path, ranks: int) -> None:
    """The same on every rank, and nothing changes."""
    last, place = dist.get_rank() == ranks - 1, folder / "refusals"
    net, optimizer = started(10, True)
    step(net, optimizer, 11)
    before = whole(state(net, optimizer), to=None)
    other, its = started(10, True, z_dim=5 if last else 4)
    save(place, net, optimizer)

    assert "fc.generator.weight is [132, 4]" in refusal(save, place, other, its)
    assert "of another model: fc.generator.weight is [132, 5] in this" in refusal(load, place, other)
    assert f"rank {ranks - 1}: " in refusal(load, place, other)
    assert "fc.generator.weight'] is [132, 4] of torch.float32 in rank 0, [132, 5]" in refusal(
        whole, other.state_dict()
    )
    assert "there is nothing" in refusal(load, folder / "missing", net)
    assert "state of AdamW, the optimizer is SGD" in refusal(load, place, *started(1, True, SGD))
    groups = AdamW(hyperfast.optim.param_groups(net), lr=0.05)
    assert "optimizer of other parameters: fc.generator." in refusal(load, place, net, groups)
    stranger = AdamW([*net.parameters(), nn.Parameter(torch.zeros(3))])
    assert "[3] that is no parameter" in refusal(save, place, net, stranger)
    assert "value f is none" in refusal(save, place, net, optimizer, f=started)
    if dist.get_rank() == 0:
        (folder / "full").mkdir()
        (folder / "full" / "notes.txt").touch()
    dist.barrier()
    assert "notes.txt" in refusal(save, folder / "full", net)
    assert "no checkpoint" in refusal(load, folder / "full", net)

    with pytest.raises(ValueError, match=f"rank {ranks - 1}: .*all ranks must share it"):
        save(folder / f"of_rank_{dist.get_rank() // (ranks - 1)}" / "last", net)

    write = dcp.FileSystemWriter.write_data
    if last:
        dcp.FileSystemWriter.write_data = no_space
    assert f"rank {ranks - 1}: [Errno {errno.ENOSPC}] No space left" in refusal(
        save, place, other_of(net), None
    )
    dcp.FileSystemWriter.write_data = write
    assert_same(load(place, net, optimizer), {})
    assert_same(whole(state(net, optimizer), to=None), before)

    dist.barrier()
    if dist.get_rank() == 0:
        damaged = place / "__0_0.distcp"
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    dist.barrier()
    again, its = started(12, True)
    untouched = whole(state(again, its), to=None)
    assert "not loaded, rank" in refusal(load, place, again, its)
    assert_same(whole(state(again, its), to=None), untouched)
    if dist.get_rank() == 0:
        (place / ".metadata").write_bytes(b"")
    dist.barrier()
    assert "damaged" in refusal(load, place, again, its)


def other_of(net):
    """Another value, which must not reach the checkpoint."""
    made = copy.deepcopy(net)
    made.norm.running_mean += 1
    return made


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def from_one(tmp_path) -> Path:
    """Checkpoints that one process without a process group wrote."""
    for storage in STORAGES:
        net, optimizer = started(0, False, state_dtype=storage)
        step(net, optimizer, 1)
        save(tmp_path / f"one-{storage}", net, optimizer, **VALUES)
        torch.save(state(net, optimizer), tmp_path / f"one-{storage}.pt")
    return tmp_path


def check_ranks(ranks: int, folder: Path) -> None:
    mp.start_processes(work, (ranks, str(folder)), nprocs=ranks, start_method="spawn")
    for storage in STORAGES:
        net, optimizer = started(20, False, state_dtype=storage)
        assert_same(load(folder / f"ranks{ranks}-{storage}", net, optimizer), VALUES)
        assert_same(state(net, optimizer), torch.load(folder / f"ranks{ranks}-{storage}.pt"))


def test_two_ranks(from_one):
    check_ranks(2, from_one)


@pytest.mark.slow
def test_four_ranks_and_two_read_what_four_wrote(from_one):
    check_ranks(4, from_one)
    net, optimizer = started(21, False)
    load(from_one / "ranks4-None", torch.compile(net), optimizer)
    for storage in STORAGES:  # two ranks go on from what four wrote
        for ending in ("", ".pt"):
            os.rename(from_one / f"ranks4-{storage}{ending}", from_one / f"was{ending}")
            remove(from_one / f"one-{storage}{ending}")
            os.rename(from_one / f"was{ending}", from_one / f"one-{storage}{ending}")
    for left in ("full", "refusals", "torch_alone"):
        shutil.rmtree(from_one / left)
    check_ranks(2, from_one)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = HyperLinear(6, 13, z_dim=4)
        self.core = HyperLinear(13, 7, generator=SharedCoreGenerator((7, 13), z_dim=2, hidden_dim=6))
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        return self.norm(self.core(torch.tanh(self.fc(x))))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, ranks: int = 1):
    """Of a batch of 8 rows, those of the rank."""
    for number in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        optimizer.zero_grad()
        net(x[rank * 8 // ranks : (rank + 1) * 8 // ranks]).square().mul(torch.arange(7)).mean().backward()
        optimizer.step()


def trained() -> nn.Module:
    torch.manual_seed(1)
    return Trained().double()


def go_on(rank: int, ranks: int, folder: str, saved: str | None, steps: range) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, f"{folder}/store{ranks}-{steps.start}")
    net = data_parallel(trained(), shard_generators=ranks > 1)
    optimizer = AdamW(net.module, lr=0.05, max_grad_norm=0.1)
    if saved is not None:
        assert load(f"{folder}/{saved}", net, optimizer) == {"step": steps.start}
    train(net, optimizer, steps, rank, ranks)
    save(f"{folder}/{steps.stop}", net, optimizer, step=steps.stop)
    dist.destroy_process_group()


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_ranks(tmp_path):
    """20 steps by two, four and one ranks in turn are those of one process with the joined batch."""
    for ranks, steps in ((2, range(5)), (4, range(5, 10)), (1, range(10, 15)), (2, range(15, 20))):
        saved = str(steps.start) if steps.start else None
        arguments = (ranks, str(tmp_path), saved, steps)
        mp.start_processes(go_on, arguments, nprocs=ranks, start_method="spawn")
    one, loaded = hyperfast.factored_(trained()), hyperfast.factored_(trained())
    optimizer, its = (AdamW(net, lr=0.05, max_grad_norm=0.1) for net in (one, loaded))
    train(one, optimizer, range(20))
    load(tmp_path / "20", loaded, its)
    for ours, theirs in zip(loaded.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(its.state.values(), optimizer.state.values(), strict=True):
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-9, atol=1e-12)


def test_states_convert_and_other_optimizers_are_saved(from_one):
    kinds = [("8bit", None), (None, "8bit")]
    for saved, wanted in kinds:
        net, optimizer = started(1, False, state_dtype=wanted)
        load(from_one / f"one-{saved}", net, optimizer)
        twin, its = started(2, False, state_dtype=wanted)
        twin.load_state_dict(net.state_dict())
        its.load_state_dict(torch.load(from_one / f"one-{saved}.pt")["optimizer"])
        assert_same(state(net, optimizer), state(twin, its))
    net = torch.nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    for make in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = make(net.parameters(), lr=0.1)
        net(torch.ones(1, 3, 3, 3)).sum().backward()
        optimizer.step()
        save(from_one / "plain", net, optimizer)
        before, again = copy.deepcopy(state(net, optimizer)), make(net.parameters(), lr=0.2)
        nn.init.zeros_(net.weight)
        load(from_one / "plain", net, again)
        assert_same(state(net, again), before)
        for key, value in again.state[net.weight].items():
            assert key == "step" or value.stride() == net.weight.stride()


def test_a_save_that_dies_leaves_a_checkpoint(from_one, monkeypatch):
    place = from_one / "one-None"
    net, optimizer = started(3, False)

    def dies(*args, **options):
        raise KeyboardInterrupt

    rename = os.rename
    deaths = [(checkpoint.dcp, "save", dies), (checkpoint, "_publish", dies)]
    deaths.append((os, "rename", lambda a, b: dies() if Path(b) == place else rename(a, b)))
    for where, name, instead in deaths:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(where, name, instead)
            save(place, net, optimizer)
        again, its = started(4, False)
        assert_same(load(place, again, its), VALUES)
        assert_same(state(again, its), torch.load(from_one / "one-None.pt"))
    save(place, net, optimizer, epoch=4)
    assert load(place, *started(5, False)) == {"epoch": 4}
    assert {path.name for path in from_one.iterdir() if path.name.startswith(".")} == set()


def save_for_ever(place: str) -> None:
    torch.set_num_threads(1)
    net, optimizer = started(0, False)
    step(net, optimizer, 1)
    for epoch in range(1, 10**9):
        nn.init.constant_(net.norm.weight, epoch)
        save(place, net, optimizer, epoch=epoch)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    place, seen = tmp_path / "last", []
    for trial in range(8):
        process = mp.get_context("spawn").Process(target=save_for_ever, args=(str(place),))
        process.start()
        while not place.exists():
            time.sleep(0.01)
        started_at = place.stat().st_mtime_ns
        while place.exists() and place.stat().st_mtime_ns == started_at:
            time.sleep(0.001)
        time.sleep(0.02 + 0.013 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        net, optimizer = started(trial, False)
        epoch = load(place, net, optimizer)["epoch"]
        assert net.norm.weight.unique().tolist() == [epoch]
        seen.append(epoch)
    assert max(seen) > 1


def die_while_saving(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join(rank, 2, f"{folder}/store")
    net, optimizer = started(1, True)
    save(f"{folder}/last", net, optimizer, epoch=1)
    if rank == 1:
        dcp.FileSystemWriter.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    step(net, optimizer, 1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        save(f"{folder}/last", net, optimizer, epoch=2)
    Path(folder, "seconds").write_text(str(time.monotonic() - begin))


@pytest.mark.slow
def test_a_rank_killed_while_saving(tmp_path):
    ranks = mp.start_processes(die_while_saving, (str(tmp_path),), 2, join=False, start_method="spawn")
    for process in ranks.processes:
        process.join()
    assert [process.exitcode for process in ranks.processes] == [0, -signal.SIGKILL]
    assert float((tmp_path / "seconds").read_text()) < 60
    net, optimizer = started(2, False)
    assert load(tmp_path / "last", net, optimizer) == {"epoch": 1} and not optimizer.state
    save(tmp_path / "last", net, optimizer, epoch=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "seconds", "store"]


def test_rows_of_a_rank_without_others():
    whole_rows = ShardedRows(torch.arange(6.0).view(3, 2), 3, 0)
    assert torch.equal(whole_rows.whole(), whole_rows.local)
    assert whole_rows.double().dtype == torch.float64 and whole_rows.rows == 3
    with pytest.raises(ValueError, match="0 to 3, not all 4 rows"):
        whole({"a": [ShardedRows(torch.zeros(3, 2), 4, 0)]})
    with pytest.raises(ValueError, match="rows 2 to 5 are not rows of 4"):
        ShardedRows(torch.zeros(3), 4, 2)
