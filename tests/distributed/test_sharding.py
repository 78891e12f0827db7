"""Sharded generators: ranks that own rows of every generator train like one process that has them all."""

import contextlib
import copy
import dataclasses
import datetime
import pickle
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hyperfast
from hyperfast.distributed import collectives, exchange, gather_weights, rows, shard_, sharding, unshard_
from hyperfast.distributed.rows import RowShard
from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator, generate_layers, generated_l2_
from hyperfast.nn.generator import generators
from hyperfast.optim import SGD, AdamW

ROWS = 24  # of the joined batch
CHECKS: dict[str, Callable[[], None]] = {}
messages: list[str] = []  # what this rank took part in


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Runs in every rank of one group of processes; float64."""
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """666 rows, and 740 of a generator without bias. skip: the second is generated, not used."""

    def __init__(self, together: bool = True):
        super().__init__()
        self.conv = HyperConv2d(2, 37, 3, z_dim=4)
        self.fc = HyperLinear(148, 5, generator=LinearGenerator((5, 148), 3, bias=False, init="hyperfan"))
        self.out = nn.Linear(5, 3)
        self.together = together

    def forward(self, x: Tensor, skip: bool = False, reentrant: bool | None = None) -> Tensor:
        w = generate_layers(self) if self.together else {"conv": None, "fc": None}

        def network(x):
            x = torch.tanh(self.conv(x, w["conv"])).flatten(1)
            return self.out(x[:, :5] if skip else torch.tanh(self.fc(x, w["fc"])))

        return network(x) if reentrant is None else checkpoint(network, x, use_reentrant=reentrant)


class Reused(nn.Module):
    """One z for two generators, one generator for two layers, each of which generates for itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = HyperLinear(32, 8, z_dim=3), HyperLinear(32, 8, z_dim=3), HyperLinear(8, 8)
        self.b.generator.z = self.a.generator.z
        self.d = HyperLinear(8, 8, generator=self.c.generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.d(torch.tanh(self.c(torch.tanh(self.a(x) + self.b(x)))))[:, :3]


class Checkpointed(nn.Module):
    """Generates within what is run again in the backward."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, reentrant: bool) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=reentrant)


def alone() -> nn.Module:
    return Net(together=False)


def shared_core() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Tanh(), nn.Linear(20, 7), nn.Linear(7, 3))
    return hyperfast.hyperize(net, "shared", z_dim=3, hidden_dim=6, init="hyperfan")


def few_rows() -> nn.Module:
    """Fewer rows than give each rank some."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 1), nn.Tanh(), nn.Linear(1, 3))
    return hyperfast.hyperize(net, "linear", z_dim=3, init="hyperfan")


def pair(build: Callable[[], nn.Module], l2: float = 0.0, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """A sharded model and the same one whole, both factored."""
    torch.manual_seed(0)
    sharded = generated_l2_(build().to(dtype), l2)
    one = hyperfast.factored_(copy.deepcopy(sharded))
    return shard_(sharded), one


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randint(3, (ROWS,), generator=generator)


def own(t: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return t.chunk(dist.get_world_size())[dist.get_rank()].detach().requires_grad_(t.requires_grad)


def losses(ddp: nn.Module, one: nn.Module, step: int = 0, **options) -> tuple[Tensor, Tensor]:
    """Of this rank and of the joined batch."""
    x, y = batch(step)
    return F.cross_entropy(ddp(own(x), **options), own(y)), F.cross_entropy(one(x, **options), y)


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """With all rows; means over ranks of those that DDP would average."""
    shards = {id(p): g.shard for _, g in generators(model) if g.shard for p in g.sharded_parameters()}
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.grad
        if p.grad is not None and id(p) in shards:
            found[name] = sharding.gather_rows(p.grad, shards[id(p)])
        elif p.grad is not None:
            found[name] = p.grad.clone()
            dist.all_reduce(found[name])
            found[name] /= dist.get_world_size()
    return found


def assert_equal_gradients(model: nn.Module, one: nn.Module, bound: float = 1e-12) -> None:
    found = whole_gradients(model)
    for name, p in one.named_parameters():
        assert (found[name] is None) == (p.grad is None), name
        if p.grad is not None:
            assert (found[name] - p.grad).norm() <= bound * p.grad.norm(), name


def assert_equal_models(model: nn.Module, one: nn.Module, bound: float) -> None:
    """Makes `model` whole."""
    expected = one.state_dict()
    for name, t in unshard_(model).state_dict().items():
        assert (t - expected[name]).abs().max() <= bound * expected[name].abs().max(), name


def trains_like_one_process(build, make_optimizer, l2: float, steps: int = 20) -> None:
    sharded, one = pair(build, l2)
    ddp = DistributedDataParallel(sharded)
    ours, theirs = make_optimizer(sharded), make_optimizer(one)
    for step in range(steps):
        for model, whole, optimizer in ((ddp, False, ours), (one, True, theirs)):
            optimizer.zero_grad()
            x, y = batch(step) if whole else map(own, batch(step))
            halves = 2 if step % 4 == 1 else 1  # accumulates
            rows = torch.arange(ROWS).view(dist.get_world_size(), halves, -1)
            rows = rows if whole else rows[:1]
            for half in range(halves):
                i = rows[:, half].reshape(-1)
                quiet = not whole and half + 1 < halves
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    (F.cross_entropy(model(x[i]), y[i]) / halves).backward()
            optimizer.step()
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
        assert step or theirs.grad_norm > ours.max_grad_norm  # clips
    assert_equal_models(sharded, one, 1e-9)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model, lr=1e-2, weight_decay=0.05, max_grad_norm=0.1)


def sgd(model: nn.Module) -> SGD:
    return SGD(model, lr=1e-2, momentum=0.9, max_grad_norm=0.1)


@check
def trains_together_with_adamw():
    trains_like_one_process(Net, adamw, 1e-2)


@check
def trains_layers_alone_with_sgd():
    trains_like_one_process(alone, sgd, 1e-2)


@check
def trains_a_shared_core_with_adamw():
    trains_like_one_process(shared_core, adamw, 1e-2)


@check
def trains_few_rows_with_adamw():
    trains_like_one_process(few_rows, adamw, 1e-2)


@check
def trains_few_rows_with_sgd():
    trains_like_one_process(few_rows, sgd, 0.0)


@check
def uses_of_one_weight_add_up():
    sharded, one = pair(Reused, 0.1)
    for loss in losses(sharded, one):
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal_gradients(sharded, one)


@check
def uses_add_up_over_an_accumulation():
    sharded, one = pair(Reused, 0.1)
    ddp = DistributedDataParallel(sharded)
    for step in range(3):
        with ddp.no_sync() if step < 2 else contextlib.nullcontext():
            for loss in losses(ddp, one, step):
                loss.backward()
    assert_equal_gradients(sharded, one)


@check
def what_nobody_uses_has_no_gradient():
    sharded, one = pair(Net, 0.1)
    for loss in losses(sharded, one, skip=True):
        loss.backward()
    assert sharded.fc.generator.carrier.grad is None
    assert_equal_gradients(sharded, one)


@check
def what_one_rank_does_not_use_counts_as_zero():
    sharded, one = pair(Net)
    skips = dist.get_rank() == dist.get_world_size() - 1
    x, y = batch()
    F.cross_entropy(sharded(own(x), skip=skips), own(y)).backward()
    parts = list(zip(x.chunk(dist.get_world_size()), y.chunk(dist.get_world_size()), strict=True))
    for i, (x, y) in enumerate(parts):
        (F.cross_entropy(one(x, skip=i + 1 == len(parts)), y) / len(parts)).backward()
    if len(parts) > 1:
        for layer in ("conv", "fc"):
            f, g = (getattr(model, layer).generator for model in (sharded, one))
            expected = g.gradient_bias.grad[f.shard.own]
            torch.testing.assert_close(f.gradient_bias.grad, expected, rtol=1e-12, atol=1e-15)


@check
def checkpoints_run_forward_again():
    for reentrant in (False, True):
        sharded, one = pair(Net, 0.1)
        ddp = DistributedDataParallel(sharded)
        for loss in losses(ddp, one, reentrant=reentrant):
            loss.backward()
        assert_equal_gradients(sharded, one)
        sharded, one = pair(Checkpointed, 0.1)
        ddp = DistributedDataParallel(sharded)
        for loss in losses(ddp, one, reentrant=reentrant):
            loss.backward()
        assert_equal_gradients(sharded, one)


@check
def messages_go_once_a_step():
    for build, gathers in ((Net, 1), (shared_core, 1), (alone, 2)):
        sharded, one = pair(build)
        ddp = DistributedDataParallel(sharded)
        optimizer = AdamW(sharded)
        messages.clear()
        with torch.inference_mode():
            sharded(own(batch()[0]))
        for _ in range(2):  # also of what was gathered in inference mode
            with ddp.no_sync():
                losses(ddp, one)[0].backward()
        losses(ddp, one)[0].backward()
        assert messages == ["gather"] * gathers + ["send"] * gathers
        optimizer.step()
        assert messages[2 * gathers :] == ["gather"]  # of norms
        messages.clear()
        gather_weights(sharded)
        ddp(own(batch()[0]))
        assert messages == ["gather"]


@check
def dw_leaves_while_the_backward_goes_on():
    sharded, one = pair(Net)
    messages.clear()
    sharded.conv.register_full_backward_pre_hook(lambda *_: messages.append("conv"))
    exchange.BUCKET, before = 740 * 8, exchange.BUCKET
    try:
        losses(sharded, one)[0].backward()
    finally:
        exchange.BUCKET = before
    assert messages == ["gather", "send", "conv", "send"]


@check
def a_backward_that_fails_leaves_nothing():
    sharded, one = pair(Net, 0.1)

    def fail(*_):
        raise ArithmeticError("here")

    handle = sharded.conv.register_full_backward_pre_hook(fail)
    loss = losses(sharded, one)[0]
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    handle.remove()
    sharded.zero_grad()
    for loss in losses(sharded, one):
        loss.backward()
    assert_equal_gradients(sharded, one)


@check
def what_was_added_up_goes_with_the_gradient():
    for set_to_none in (True, False, None):  # None: is kept
        sharded, one = pair(Net, 0.1)
        ddp = DistributedDataParallel(sharded)
        optimizer = AdamW(sharded)
        messages.clear()
        with ddp.no_sync():
            losses(ddp, one)[0].backward()
        assert messages == ["gather"]
        with pytest.raises(RuntimeError, match="has not been sent"):
            optimizer.step()
        if set_to_none is not None:
            optimizer.zero_grad(set_to_none=set_to_none)
        if set_to_none is False:  # looks like any other change
            with ddp.no_sync(), pytest.raises(RuntimeError, match="set_to_none=True"):
                losses(ddp, one)[0].backward()
            optimizer.zero_grad()
        mine, expected = losses(ddp, one)
        mine.backward()
        expected.backward(retain_graph=set_to_none is None)
        if set_to_none is None:
            expected.backward()
        assert_equal_gradients(sharded, one)


@check
def a_backward_of_losses_in_and_out_of_no_sync_loses_nothing():
    for quiet_first in (True, False):
        sharded, one = pair(Net)
        ddp = DistributedDataParallel(sharded)
        if not quiet_first:
            loud, expected = losses(ddp, one)
        with ddp.no_sync():
            quiet, also_expected = losses(ddp, one, 1)
        if quiet_first:
            loud, expected = losses(ddp, one)
        (quiet + loud).backward()
        if quiet_first:  # its dw comes when the message has left
            with pytest.raises(RuntimeError, match="have no part of a forward within"):
                AdamW(sharded).step()
            ddp.zero_grad()
            loud, also_expected = losses(ddp, one)[0], 0
            loud.backward()
        (expected + also_expected).backward()
        assert_equal_gradients(sharded, one)


@check
def parts_can_be_frozen():
    for names in (("weight",), ("weight", "bias"), ("z",), ("weight", "bias", "z")):
        sharded, one = pair(Net, 0.1)
        for model in (sharded, one):
            for name in names:
                getattr(model.conv.generator, name).requires_grad_(False)
        ddp = DistributedDataParallel(sharded)
        with ddp.no_sync():
            losses(ddp, one)[0].backward()
        mine, expected = losses(ddp, one)
        mine.backward()
        expected.backward(retain_graph=True)
        expected.backward()
        assert_equal_gradients(sharded, one)
        ours, theirs = adamw(sharded), adamw(one)
        ours.step(), theirs.step()
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)
        assert_equal_models(sharded, one, 1e-9)


@check
def norms_are_those_of_all_rows():
    for norm_type in (1, 2, 3.5, float("inf")):
        for build in (Net, few_rows):
            sharded, one = pair(build)
            ddp = DistributedDataParallel(sharded)
            for loss in losses(ddp, one):
                loss.backward()
            norm = hyperfast.optim.clip_grad_norm_(sharded, 0.1, norm_type)
            expected = hyperfast.optim.clip_grad_norm_(one, 0.1, norm_type)
            torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
            everywhere = sharding.all_gather(norm.view(1))
            assert (everywhere == norm).all()
            assert_equal_gradients(sharded, one)


@check
def a_nonfinite_gradient_of_one_rank_stops_all():
    sharded, one = pair(Net)
    ddp, optimizer = DistributedDataParallel(sharded), AdamW(sharded, nonfinite="skip")
    losses(ddp, one)[0].backward()
    if dist.get_rank() == 0:
        sharded.conv.generator.bias.grad[0] = float("nan")
    before = [p.detach().clone() for p in sharded.parameters()]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, old) for p, old in zip(sharded.parameters(), before, strict=True))


@check
def low_precision_states_train():
    for state_dtype, bound in ((torch.bfloat16, 1e-3), ("8bit", 1e-2)):
        sharded, one = pair(Net, dtype=torch.float32)
        ddp = DistributedDataParallel(sharded)
        x, y = (t.float() if t.is_floating_point() else t for t in batch())
        optimizers = [AdamW(m, lr=1e-3, state_dtype=state_dtype) for m in (sharded, one)]
        for _ in range(5):
            for model, optimizer, part in zip((ddp, one), optimizers, (own, lambda t: t), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(part(x)), part(y)).backward()
                optimizer.step()
        assert (sharded(x) - one(x)).norm() < bound * one(x).norm()


@check
def dtypes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sharded, one = pair(Net, dtype=dtype)
        x, y = batch()
        x = x.to(dtype)
        assert torch.equal(sharded(x), one(x))
        F.cross_entropy(sharded(own(x)).float(), own(y)).backward()
        F.cross_entropy(one(x).float(), y).backward()
        assert sharded.conv.generator.bias.grad.dtype == dtype
        assert_equal_gradients(sharded, one, 20 * torch.finfo(dtype).eps)


@check
def autocast_gathers_its_dtype():
    x, y = batch()
    for l2, dtype in ((0.0, torch.bfloat16), (0.1, torch.float32)):
        sharded, one = pair(Net, l2, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(sharded(own(x).float()).float(), own(y))
            expected = F.cross_entropy(one(x.float()).float(), y)
            assert torch.equal(sharded(x.float()), one(x.float()))
        assert sharded.conv.generator.gathered.w.dtype == dtype
        loss.backward(), expected.backward()
        assert_equal_gradients(sharded, one, 0.02)
        messages.clear()
        assert torch.equal(sharded(x.float()), one(x.float()))
        assert messages == (["gather"] if dtype == torch.bfloat16 else [])


@check
def the_model_is_the_whole_one_to_others():
    sharded, one = pair(Net)
    x, _ = batch()
    expected = one(x)
    copied, unpickled = copy.deepcopy(sharded), pickle.loads(pickle.dumps(sharded))
    assert all(torch.equal(model(x), expected) for model in (sharded, copied, unpickled))
    assert torch.equal(hyperfast.freeze(sharded)(x), expected)
    plain = hyperfast.nn.plain_state_dict(sharded)
    assert all(torch.equal(t, plain[name]) for name, t in hyperfast.nn.plain_state_dict(one).items())
    assert hyperfast.nn.parameter_counts(sharded) == hyperfast.nn.parameter_counts(one)
    costs, z_report = hyperfast.analysis.generator_costs, hyperfast.analysis.z_report
    assert costs(sharded).to_markdown() == costs(one).to_markdown()
    assert z_report(sharded).to_markdown() == z_report(one).to_markdown()
    assert torch.equal(sharded.float()(x.float()), one.float()(x.float()))
    functional = torch.func.functional_call(sharded, dict(sharded.named_parameters()), (x.float(),))
    assert torch.equal(functional, one(x.float()))


@check
def edits_are_seen():
    sharded, one = pair(Net)
    x, _ = batch()
    with torch.no_grad():
        sharded(x)
        sharded.conv.generator()[0].mul_(2)  # of what is kept
        assert torch.equal(sharded(x), one(x))
        for model in (sharded, one):
            model.conv.generator.z.mul_(1.5)
        assert torch.equal(sharded(x), one(x))
        for model in (sharded, one):
            model.fc.generator.weight.data.mul_(1.5)
        hyperfast.invalidate(sharded)
        assert torch.equal(sharded(x), one(x))


@check
def a_rank_holds_its_share():
    sharded, one = pair(lambda: nn.Sequential(nn.Flatten(), HyperLinear(32, 128, z_dim=8)))
    ddp, optimizer = DistributedDataParallel(sharded), AdamW(sharded)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(ddp(own(batch()[0])), own(batch()[1])).backward()
        optimizer.step()
    g = sharded[1].generator
    n, ranks = len(g.weight), dist.get_world_size()
    assert n <= 4096 / ranks + 32
    states = [s for p in (g.weight, g.bias) for s in optimizer.state[p].values() if s.dim()]
    assert sum(t.untyped_storage().nbytes() for t in (g.weight, g.bias, *states)) == 3 * 9 * n * 8
    assert g.bias.grad.untyped_storage().nbytes() == (g.shard.chunk + 1) * 8
    assert g.gathered.w.untyped_storage().nbytes() == g.shard.chunk * ranks * 8
    w = g()[0]
    assert w.data_ptr() == g.gathered.w.data_ptr()  # no copy


@check
def reduce_scatters_where_there_is_nccl():
    """With gloo's reduce-scatter in NCCL's place, which takes the mean as well."""
    real, is_nccl = dist.reduce_scatter_tensor, collectives._is_nccl

    def mean(out, parts, op, group, async_op):
        assert op == dist.ReduceOp.AVG and async_op
        real(out, parts, dist.ReduceOp.SUM, group=group)
        out /= dist.get_world_size(group)
        return SimpleNamespace(wait=lambda: None)

    dist.reduce_scatter_tensor, collectives._is_nccl = mean, lambda device, group: True
    try:
        uses_of_one_weight_add_up()
        what_was_added_up_goes_with_the_gradient()
    finally:
        dist.reduce_scatter_tensor, collectives._is_nccl = real, is_nccl


@check
def there_and_back():
    torch.manual_seed(0)
    model = hyperfast.hyperize(Net().double(), z_dim=2, init="hyperfan")
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    shard_(model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {"module.conv.generator.weight", "module.conv.generator.bias"} < set(ignored)
    sharded = dict(model.named_parameters())
    assert all(sharded[name] is p for name, p in parameters.items())
    unshard_(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(name.endswith(("bias", "carrier")) for name in model._ddp_params_and_buffers_to_ignore)


@check
def clear_refusals():
    sharded, one = pair(Net)
    x, y = batch()
    with pytest.raises(ValueError, match="sharded already"):
        shard_(sharded)
    for call in (
        lambda: hyperfast.factored_(sharded, False),
        lambda: sharded.conv.generator.reset_parameters(),
        lambda: sharded.conv.generator.keep_(torch.zeros(37, 2, 3, 3)),
    ):
        with pytest.raises(ValueError, match="unshard_"):
            call()
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.jvp(sharded, (x,), (x,))
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match="must be rows"):
            torch.func.functional_call(sharded, dict(one.named_parameters()), (x,))
    w = sharded.conv.generator()[0]
    with pytest.raises(RuntimeError, match="view"):
        w.mul_(2)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(sharded(x).sum(), [sharded.conv.generator.z], create_graph=True)
    for other in ({"ranks": dist.get_world_size() + 1}, {"rank": dist.get_rank() + 1}):  # was pickled there
        g = shard_(HyperLinear(4, 3)).generator
        g.set_shard(dataclasses.replace(g.shard, **other), g.generate_sharded)
        with pytest.raises(RuntimeError, match="of a group of"):
            g()
    one_rank = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    ddp = DistributedDataParallel(nn.Sequential(shard_(HyperLinear(4, 3), one_rank), nn.Linear(3, 3)))
    if dist.get_world_size() > 1:
        with pytest.raises(RuntimeError, match="DDP is over ranks .* sharded over"):
            ddp(torch.ones(1, 4))

    class Own(LinearGenerator):
        def forward(self, z=None):
            return super().forward(z)

    with pytest.raises(ValueError, match="forward of its own"):
        shard_(HyperLinear(4, 3, generator=Own((3, 4))))


@check
def compiled_with_a_graph_break():
    sharded, one = pair(Net, 0.1)
    for loss in losses(torch.compile(sharded, backend="aot_eager"), one):
        loss.backward()
    assert_equal_gradients(sharded, one)


SLOW = {"compiled_with_a_graph_break"}


def count_messages() -> None:
    """Notes every message of weights and gradients."""
    gather, reduce_scatter = sharding.all_gather, exchange.ReduceScatter

    def noted(*arguments):
        messages.append("gather")
        return gather(*arguments)

    def sent(*arguments):
        messages.append("send")
        return reduce_scatter(*arguments)

    sharding.all_gather = rows.all_gather = noted
    exchange.ReduceScatter = sent


def work(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    count_messages()
    failed = {}
    for name in names:
        torch.manual_seed(20)
        try:
            CHECKS[name]()
        except Exception:
            failed[name] = traceback.format_exc()
            break  # the others may wait for what this rank does not send now
    torch.save(failed, f"{folder}/failed{rank}.pt")
    dist.destroy_process_group()


def run(ranks: int, names: list[str], folder) -> None:
    mp.start_processes(work, (ranks, str(folder), names), nprocs=ranks, start_method="spawn")
    failed = [torch.load(folder / f"failed{rank}.pt") for rank in range(ranks)]
    assert not any(failed), "\n".join(f"rank {r}: {f}" for r, own in enumerate(failed) for f in own.values())


needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@needs_gloo
@pytest.mark.timeout(240)
def test_two_ranks(tmp_path):
    run(2, [name for name in CHECKS if name not in SLOW], tmp_path)


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_other_numbers_of_ranks(ranks, tmp_path):
    run(ranks, list(CHECKS), tmp_path)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 666, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_rows_of_ranks_and_their_scales(rows, ranks):
    shards = [RowShard(rows, rank, ranks) for rank in range(ranks)]
    assert shards[0].start == 0 and shards[-1].stop == rows
    assert all(a.stop == b.start for a, b in zip(shards, shards[1:], strict=False))
    assert all(shard.start % 32 == 0 or shard.start == rows for shard in shards)
    for rows_per_scale in (1, 2, 8, 32):
        for shard in shards:
            scales = shard.of_scales(rows_per_scale)
            assert scales.start == -(-shard.start // rows_per_scale)
            assert scales.stop - scales.start == -(-(shard.stop - shard.start) // rows_per_scale)
    with pytest.raises(ValueError, match="divide"):
        shards[0].of_scales(5)
