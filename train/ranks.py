"""The processes that train one network together, `torchrun --nproc-per-node 2 -m train.cifar100`, as the loop
sees them: `Ranks` is one process alone, for which nothing here does anything, `Group` a process group.

A batch is that of all ranks together, of which each takes its rows, so a run may go on with another number of
them. The first rank writes, draws and prints. What ends a run, a signal, an error or a figure that is not
finite, ends it on all ranks after the same step.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import itertools
import os
import re
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hyperfast.distributed import data_parallel, whole
from hyperfast.distributed.agreement import gather_values, is_joined
from hyperfast.distributed.collectives import all_gather
from train.checkpoint import CheckpointError, one_line
from train.data import DataError
from train.task import RunError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHARED = (RunError, CheckpointError, DataError, OSError)  # what goes wrong for a reason the user can mend
# what torch says, in an ordinary RuntimeError, of communication; of a process that is gone or silent
COMMUNICATION = re.compile(r"gloo|NCCL|Socket|TCPStore", re.IGNORECASE)
SILENT = re.compile(r"timed? ?out", re.IGNORECASE)
GONE = re.compile(rf"connection (\w+ )*closed|connection reset|broken pipe|{SILENT.pattern}", re.IGNORECASE)
POLL = 0.1  # seconds
MARK = ".job"  # in the folder of a run that a job of torchrun is making: which one
T = TypeVar("T")


class Ranks:
    """One process. received: the signal that it got, 0 if none."""

    rank, count = 0, 1
    joined = False  # whether there is a process group
    received = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def signal(self) -> int:
        """The signal that ends the run, 0 if none: on all ranks from the same exchange on."""
        return self.received

    def share(self, n: int) -> slice:
        """This rank's of n rows, as even as can be."""
        return slice(self.rank * n // self.count, (self.rank + 1) * n // self.count)

    def own_batch(self, batch_size: int) -> int:
        """This rank's part of a batch. Raises RunError where not all have the same."""
        if batch_size % self.count:
            raise RunError(f"batch size {batch_size} cannot be divided by {self.count} processes")
        return batch_size // self.count

    def own_rows(self, x: Tensor, batch_size: int) -> Tensor:
        """This rank's rows of each batch in x [batches of batch_size, ...]."""
        return x

    def gather(self, figures: Tensor) -> Tensor:
        """[ranks, ...] of every rank's `figures`. An exchange."""
        return figures.unsqueeze(0)

    def total(self, *sums: Any) -> tuple[Any, ...]:
        """Each of the sums over all ranks. An exchange."""
        return sums

    def together(self, work: Callable[[], T]) -> T:
        """work() on every rank, which exchanges nothing; an error on any of them is raised on all."""
        return work()

    def on_first(self, work: Callable[[], T]) -> T:
        """work() of the first rank alone, for which the others wait; its result, or its error, on all."""
        return work()

    def check_equal(self, **values: Any) -> None:
        """Raises RunError on all ranks where one has other values, dicts of plain ones, than the first."""

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to train instead of `model`, so that gradients are means over ranks."""
        return model

    def settle(self, model: nn.Module) -> None:
        """After the steps of an epoch: makes all of `model` the same on all ranks."""

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what the ranks have shared out gathered on the first one; None on others."""
        return state


ALONE = Ranks()  # where nothing but its rank and number is asked for


class Group(Ranks):
    """The ranks of torch's process group."""

    joined = True
    signal = 0

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        on_gpu = dist.get_backend() == dist.Backend.NCCL
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def own_rows(self, x: Tensor, batch_size: int) -> Tensor:
        return x.unflatten(0, (-1, batch_size))[:, self.share(batch_size)].flatten(0, 1)

    def gather(self, figures: Tensor) -> Tensor:
        flat = torch.cat((figures.flatten(), figures.new_full((1,), self.received)))
        everyones = all_gather(flat)
        self.signal = int(everyones[:, -1].max())
        return everyones[:, :-1].unflatten(1, figures.shape)

    def total(self, *sums: Any) -> tuple[Any, ...]:
        own = torch.tensor([float(value) for value in sums], dtype=torch.float64, device=self.device)
        return tuple(self.gather(own).sum(0).tolist())

    def together(self, work: Callable[[], T]) -> T:
        result, error = None, None
        try:
            result = work()
        except SHARED as caught:
            error = caught
        errors = gather_values(_portable(error))
        if any(errors):
            self._raise(errors)
        return result

    def _raise(self, errors: list[Exception | None]) -> NoReturn:
        """The first error, with its rank unless all have the same."""
        if len(set(map(str, errors))) == 1:
            raise errors[0]
        rank, error = next((i, e) for i, e in enumerate(errors) if e is not None)
        raise type(error)(f"rank {rank}: {error}")

    def on_first(self, work: Callable[[], T]) -> T:
        result, error = None, None
        if self.first:
            try:
                result = work()
            except SHARED as caught:
                error = caught
        outcome = [result, _portable(error)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def check_equal(self, **values: Any) -> None:
        first, *others = gather_values(values)
        for rank, other in enumerate(others, start=1):
            for what, theirs in other.items():
                names = [n for n in first[what] | theirs if first[what].get(n) != theirs.get(n)]
                differ = [f"{n} {theirs.get(n)} instead of {first[what].get(n)}" for n in names]
                if differ:
                    raise RunError(f"rank {rank} has another {what} than rank 0: {'; '.join(differ)}")

    def parallel(self, model: nn.Module) -> nn.Module:
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return data_parallel(model, gradient_as_bucket_view=True, **{buffers: False})

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Batch norm's running statistics, each of a rank's own rows, become their mean."""
        statistics = list(_statistics(model))
        if statistics:
            mean = torch.cat([buffer.flatten() for buffer in statistics])
            dist.all_reduce(mean)
            mean /= self.count
            for buffer, part in zip(statistics, mean.split([b.numel() for b in statistics]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        return whole(state, to=0)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """The floating-point buffers that a state dict holds, of one device and dtype."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                yield buffer


def _portable(error: Exception | None) -> Exception | None:
    """The error without what cannot be sent: its cause and traceback."""
    return None if error is None else type(error)(str(error))


# -- the process group ---------------------------------------------------------------------------


def here() -> Ranks:
    """The ranks that this process trains with."""
    return Group() if is_joined() else Ranks()


def processes() -> int:
    """How many torchrun started, 1 without it. Raises RunError where its environment is not complete."""
    if not any(name in os.environ for name in TORCHRUN[:3]):
        return 1
    wrong = [name for name in TORCHRUN if not os.environ.get(name)]
    wrong = wrong or [name for name in TORCHRUN if name != "MASTER_ADDR" and not os.environ[name].isdigit()]
    if wrong:
        present = ", ".join(name for name in TORCHRUN if os.environ.get(name))
        raise RunError(
            f"{present} in the environment without a right {', '.join(wrong)}: start with torchrun"
        )
    return int(os.environ["WORLD_SIZE"])


def alone(what: str) -> None:
    """Raises RunError under torchrun with several processes."""
    if processes() > 1:
        raise RunError(f"{what} is for one process: start it with python, not with torchrun")


def launcher() -> str:
    """What starts a program like this one, as it stands in reports."""
    if "RANK" not in os.environ:
        return "python"
    count = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return f"torchrun --nproc-per-node {local}" + (f" --nnodes {count // local}" if count > local else "")


def was_restarted(ranks: Ranks) -> bool:
    """Whether torchrun started the processes again after one of them failed, which its own node counts. An
    exchange."""
    return ranks.total(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))[0] > 0


def _job() -> bytes:
    """What torchrun's job is called, with its restarts; nothing without torchrun."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ[name] for name in names if name in os.environ).encode()


def mark(out: Path) -> None:
    """Notes in the folder `out` that the run there is this job's, to go on with when it is restarted."""
    if job := _job():
        (out / MARK).write_bytes(job)


def unmark(out: Path) -> None:
    """The run in `out` is done, or no one's to go on with."""
    (out / MARK).unlink(missing_ok=True)


def goes_on(out: Path, restarted: bool) -> bool:
    """Whether this job had begun the run in `out` before it was restarted."""
    file = out / MARK
    own = file.exists() and file.read_bytes() == _job()
    if own and not restarted:  # jobs may have the same name: that was another
        unmark(out)
    return own and restarted


@contextlib.contextmanager
def joined(args: Namespace) -> Iterator[Ranks]:
    """The ranks to train with, in a process group on args.device, which becomes this process's own GPU; only
    the first rank's standard output is seen meanwhile. A group that is there already stays. Raises
    RunError."""
    if is_joined() or (processes() == 1 and not (args.shard_generator and "RANK" in os.environ)):
        yield here()
        return
    join(args)
    with contextlib.ExitStack() as stack:
        if not here().first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield here()
    dist.destroy_process_group()  # after an error the others may be gone: the process's end does it


def join(args: Namespace) -> None:
    """Makes the process group of torchrun's processes and sets args.device. Raises RunError."""
    kind, _, index = args.device.partition(":")
    on_gpu, options = kind == "cuda", {}
    if on_gpu:
        if index:
            raise RunError(f"--device {args.device}: each process takes a GPU of its own; give cuda")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        there = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= there:
            raise RunError(f"--device {args.device}: there are {there} GPUs, one for each process is needed")
        torch.cuda.set_device(args.device)
        options["device_id"] = torch.device(args.device)
    timeout = datetime.timedelta(seconds=args.timeout)
    try:
        store, rank, count = _meeting(timeout)
        options |= {
            "store": _agreed(store, rank, count, timeout),
            "rank": rank,
            "world_size": count,
            "timeout": timeout,
        }
        dist.init_process_group("nccl" if on_gpu else "gloo", **options)
    except (RuntimeError, ValueError) as error:
        within = f" within {args.timeout} s" if SILENT.search(str(error)) else ""
        raise RunError(f"the processes did not meet{within}: {one_line(error)}") from error


@functools.cache
def _meeting(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store of torchrun's processes, this one's rank and how many there are. Once: rank 0 may host it."""
    return next(dist.rendezvous("env://", timeout=timeout))


_groups = itertools.count()


def _agreed(store: dist.Store, rank: int, count: int, timeout: datetime.timedelta) -> dist.Store:
    """Of the store, the part of one process group. torchrun's store outlives a restart, with what the dead
    left in it, and nodes count restarts differently: so the first rank names the group to each of the others
    that asks it now. For a later group than the first they wait without limit: it may be writing a report."""
    later, own = next(_groups) > 0, uuid.uuid4().hex
    if rank:
        store.set(f"asks {rank}", own)
        _poll(lambda: store.check([f"answer {own}"]), "rank 0", None if later else timeout)
        name = store.get(f"answer {own}").decode()
        store.set(f"{name} {rank}", "here")
        return dist.PrefixStore(name, store)
    for other in range(1, count):

        def is_there(other: int = other) -> bool:
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", own)
            return store.check([f"{own} {other}"])

        _poll(is_there, f"rank {other}", timeout)
    return dist.PrefixStore(own, store)


def _poll(is_there: Callable[[], bool], who: str, timeout: datetime.timedelta | None) -> None:
    """Waits, seeing signals. Raises RuntimeError after the timeout, if there is one."""
    start = time.monotonic()
    while not is_there():
        if timeout is not None and time.monotonic() - start > timeout.total_seconds():
            raise RuntimeError(f"timed out waiting for {who}")
        time.sleep(POLL)


def lost(error: RuntimeError) -> str | None:
    """In one line why the others cannot be reached, None for an error of another kind."""
    text = " ".join(str(error).split())
    gone = GONE.search(text)
    if not (gone or isinstance(error, dist.DistError) or COMMUNICATION.search(text)):
        return None
    if not gone:
        return f"communication failed: {text}"
    text = re.sub(r"^\[[^\]]*\]\s*", "", text)  # gloo: place in its source, reason, advice
    return f"another process ended or does not answer: {text.partition('. ')[0]}"
