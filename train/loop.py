"""The training loop of all commands: epochs, evaluation, records, checkpoints, resume.

What is learned from which data is a `train.task.Task`. Epoch e of a run with seed s draws its dropout, its
data order and its augmentation from generators seeded by (s, e) alone, and what is carried from step to step
begins anew, so the state at the end of an epoch is the parameters, the optimizer and the history: what
`last.pt` holds. A run that was killed at any moment and resumed ends with the parameters of one that was
not (CPU, same threads). On a GPU it goes on with the same order, augmentation and dropout, but not bit for
bit: cuDNN chooses its algorithms by timing and some of them add in no fixed order, between two whole runs as
well.

On a GPU the step is a CUDA graph (`train.graph`), the data lie there, and batches are augmented many at a
time, since that takes a hundred short kernels however many images there are.

Several processes train one network as `train.ranks` says. Every figure on which a decision depends is that of
all of them, so that all take the same one.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import io
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hyperfast.analysis import z_report
from hyperfast.nn import named_weights
from train import checkpoint
from train.graph import CaptureError, CudaGraph, GraphedStep
from train.ranks import Ranks, here
from train.task import Metric, Row, RunError, Task
from train.transfer import carry_moments, start_from_

WINDOW = 20  # steps whose figures a GPU keeps before the host waits for them
OWN = ("device", "threads", "torch")  # circumstances in which the ranks of a run may differ


class Interrupted(Exception):
    """A signal ended the run after a whole step; `last.pt` holds the last epoch's end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Config:
    """What the loop needs to know of a recipe. `max_steps` counts from the run's beginning. `batch_size` is
    that of all ranks together."""

    epochs: int
    batch_size: int
    seed: int = 42
    patience: int | None = None  # epochs without a better validation figure
    precision: str = "fp32"  # "bf16": autocast
    device: str = "cpu"
    cuda_graph: bool = False  # the step as one CUDA graph; the optimizer must be capturable
    target: float | None = None  # the run ends when the figure of the last part reaches it
    max_steps: int | None = None
    eval_batches: int | None = None
    save_every: int = 1  # epochs between two last.pt


@dataclass(frozen=True)
class Stages:
    """A network of which more layers are generated as the training goes on.

    at: the epochs, counted from 0, before which that happens. build(epoch): network, optimizer and step
    function as that epoch trains them, newly initialised.
    """

    at: tuple[int, ...]
    build: Callable[[int], tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor | float]]]

    def number(self, epoch: int) -> int:
        """How many changes there were by `epoch`."""
        return sum(at <= epoch for at in self.at)


class Trainer:
    """Trains `model` for the task `data`; keeps `out`: last.pt, best.pt, metrics.csv, TensorBoard files.

    `step()` clips, updates the parameters and returns the gradient norm before clipping; it may raise
    FloatingPointError. With config.cuda_graph it must not wait for the device, and its optimizer takes the
    learning rate as a tensor. A gradient that is not finite ends the run when the figures are looked at;
    `last.pt` is of the last epoch's end. `schedule(epoch, step)` gives the learning rate of the step to come,
    both counted from 0. `recipe` (plain values) must be equal on resume; `circumstances` may differ, which is
    said.
    `stages`: the network changes, outputs kept; the first three arguments are those of epoch 0.

    The ranks are those of torch's process group, if there is one. The first one keeps `out`, where all must
    find it to resume. All call `fit`; nothing is exchanged before.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Task,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Tensor | float],
        schedule: Callable[[int, int], float],
        config: Config,
        out: Path,
        recipe: dict[str, Any],
        circumstances: dict[str, Any] | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.model, self.optimizer, self.step, self.schedule = model, optimizer, step, schedule
        self.config, self.out, self.ranks = config, out, here()
        self.ranks.own_batch(config.batch_size)
        self.recipe, self.circumstances = recipe, circumstances or {}
        self.stages, self.epoch_built = stages, 0
        self.device = torch.device(config.device)
        self.window = 1 if self.device.type == "cpu" else WINDOW
        self.data, self.metric, self.reported = data.to(self.device), data.metric, data.parts[-1]
        self.steps_per_epoch = data.steps(config.batch_size)
        self.history: list[Row] = []
        self.best: Row | None = None
        self.steps = 0
        self.initial_z = z_statistics(model)
        self._signals = _Signals(self.ranks)
        self._prepare_step()

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> str:
        """Train until the end and return why it ended; raises Interrupted, RunError, CheckpointError."""
        with self._signals:
            self._check_ranks()
            self._trained = self.ranks.parallel(self.model)
            if not self.history:
                self._save_last()
            with self._board() as board:
                while (reason := self._ended()) is None:
                    self._run_epoch(board)
        return reason

    def _check_ranks(self) -> None:
        """Raises RunError, on all ranks, where they do not make the same run."""
        circumstances = {name: value for name, value in self.circumstances.items() if name not in OWN}
        beginning = {"epoch": len(self.history), "step": self.steps}
        self.ranks.check_equal(recipe=self.recipe, circumstances=circumstances, beginning=beginning)

    def _board(self) -> AbstractContextManager:
        if not self.ranks.first:
            return nullcontext()
        return SummaryWriter(self.out / "tensorboard", purge_step=len(self.history) + 1)

    def _ended(self) -> str | None:
        config, epoch, metric = self.config, len(self.history), self.metric
        if (reached := self.target_row()) is not None:
            figure = f"{self.reported} {metric.words} {metric.cell(reached, self.reported)}"
            return f"{figure} reached after epoch {reached['epoch']}"
        if epoch >= config.epochs:
            return f"all {config.epochs} epochs done"
        if self.best and config.patience and epoch - self.best["epoch"] >= config.patience:
            return f"no better validation {metric.words} in {config.patience} epochs"
        if config.max_steps is not None and self.steps >= config.max_steps:
            return f"{config.max_steps} steps done"
        return None

    def target_row(self) -> Row | None:
        """The first epoch that reached the target, if there is a target and such an epoch."""
        target, metric = self.config.target, self.metric
        if target is None:
            return None
        reached = (row for row in self.history if not metric.better(target, metric.of(row, self.reported)))
        return next(reached, None)

    def _run_epoch(self, board: SummaryWriter | None) -> None:
        """One epoch with evaluation; the records and checkpoints are written last."""
        epoch = len(self.history) + 1
        self._change(epoch - 1)
        row: Row = {"epoch": epoch, **self._train(epoch - 1)}
        start = time.perf_counter()
        self.ranks.settle(self.model)
        for part in self.data.parts:
            loss, figure = self.evaluate(part)
            row |= {f"{part}_loss": loss, f"{part}_{self.metric.name}": figure}
            if not math.isfinite(loss):
                raise RunError(f"epoch {epoch}: {part} loss is {loss}")
        row["evaluation_seconds"] = time.perf_counter() - start
        row["training_seconds"] = row["seconds"] + sum(earlier["seconds"] for earlier in self.history)
        row |= z_statistics(self.model)
        self.history.append(row)
        if self.best is None or self._is_better(row, self.best):
            self.best = row
            self._save_best()
        if self._last_is_due(row):
            self._save_last()
        self.ranks.on_first(partial(self._record, row, board))

    def _record(self, row: Row, board: SummaryWriter) -> None:
        write_csv(self.out / "metrics.csv", self.history)
        for name, value in row.items():
            if name != "epoch":
                board.add_scalar(name, value, row["epoch"])
        print(self._line(row), flush=True)

    def _change(self, epoch: int) -> None:
        """Generates the layers that are generated from `epoch` on: weights and moments go on as they are."""
        model, optimizer = self.model, self.optimizer
        if self._build(epoch):
            start_from_(self.model, model.state_dict(), f"epoch {epoch}")
            carry_moments(model, optimizer, self.model, self.optimizer)
            self._trained = self.ranks.parallel(self.model)
            before = {name for name, *_ in named_weights(model)}
            names = [name for name, *_ in named_weights(self.model) if name not in before]
            print(f"epoch {epoch + 1}: generated from here on: {', '.join(names)}", flush=True)

    def _build(self, epoch: int) -> bool:
        """Builds the network that `epoch` trains if it is another one; whether it was."""
        if self.stages is None or self.stages.number(epoch) == self.stages.number(self.epoch_built):
            return False
        torch.manual_seed(derive_seed(self.config.seed, epoch, "stage"))
        self._run_step = self._eager_step  # a graph gives its memory back before the new network takes some
        self.model, self.optimizer, self.step = self.stages.build(epoch)
        self.epoch_built = epoch
        self._prepare_step()
        return True

    def _last_is_due(self, row: Row) -> bool:
        """At every `save_every`-th epoch's end and the last; never where `max_steps` cut an epoch short."""
        if row["steps"] < self.steps_per_epoch:
            return False
        limit = self.config.max_steps
        cut_next = limit is not None and self.steps + self.steps_per_epoch > limit
        return row["epoch"] % self.config.save_every == 0 or cut_next or self._ended() is not None

    def _is_better(self, row: Row, than: Row) -> bool:
        return self.metric.better(*(self.metric.of(r, "validation") for r in (row, than)))

    def _line(self, row: Row) -> str:
        """An epoch for the terminal."""
        figures = [f"{part} {self.metric.cell(row, part)}" for part in ("train", *self.data.parts)]
        speed = f"{row[f'{self.data.unit}_per_second']:.0f} {self.data.unit}/s"
        seconds = f"{row['seconds'] + row['evaluation_seconds']:.0f} s"
        start = f"epoch {row['epoch']}/{self.config.epochs}: loss {row['train_loss']:.3f}"
        return ", ".join([start, *figures, speed, seconds])

    # -- steps ------------------------------------------------------------------------------------

    def _prepare_step(self) -> None:
        """Makes the step of the network and optimizer as they are now. A graph holds the addresses of their
        tensors: whatever replaces those comes here afterwards."""
        self._trained = self.model  # what its forward goes through, with others from `fit` on
        self._run_step: Callable[[Tensor, Tensor], Tensor] = self._eager_step
        self._rate: Tensor | None = None
        if self.config.cuda_graph:
            self._run_step = GraphedStep(self._eager_step, CudaGraph(self.device))
            self._rate = torch.zeros((), device=self.device)  # read by the graph
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate

    def _set_rate(self, rate: float, before: float | None) -> None:
        """The learning rate of the step to come; `before`: of the last one, None if unknown."""
        if self._rate is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        elif rate != before:
            self._rate.fill_(rate)

    def _train(self, epoch: int) -> Row:
        """The steps of one epoch (counted from 0); fewer where `max_steps` ends it."""
        config, limit = self.config, self.steps_per_epoch
        if config.max_steps is not None:
            limit = min(limit, config.max_steps - self.steps)
        torch.manual_seed(derive_seed(config.seed, epoch, "model", self.ranks.rank))
        self.model.train()
        meter = _Meter(epoch, self.window, self.device, self.ranks)
        rate, started = None, self._seconds_to_start()
        self._wait_for_device()
        start, waiting = time.perf_counter(), _Stopwatch(self.device)
        inputs = self._train_batches(epoch)
        # tqdm counts images or characters, so its rate is that of them
        count = self.data.count(config.batch_size)
        options = {"unit": f" {self.data.unit}", "unit_scale": True, "leave": False}
        options["disable"] = None if self.ranks.first else True
        bar = tqdm(total=limit * count, desc=f"epoch {epoch + 1}", **options)
        with bar:
            for _ in range(limit):
                self._signals.check()
                with waiting:
                    x, y = next(inputs)
                before, rate = rate, self.schedule(epoch, self.steps)
                self._set_rate(rate, before)
                meter.add(self._checked_step(x, y, epoch), count)
                self.steps += 1
                bar.update(count)
                if meter.fresh:
                    figure = self.metric.text(self.metric.mean(meter.score, meter.count))
                    bar.set_postfix({"loss": f"{meter.loss:.3f}", self.metric.name: figure}, refresh=False)
            meter.flush()
        self._wait_for_device()
        seconds = time.perf_counter() - start
        row = {
            "steps": limit,
            "lr": rate,
            "train_loss": meter.loss,
            f"train_{self.metric.name}": self.metric.mean(meter.score, meter.count),
            "gradient_norm": meter.norm,
            "seconds": seconds,
            "input_seconds": waiting.seconds(),
            f"{self.data.unit}_per_second": meter.count / seconds,
        }
        if config.cuda_graph:
            row["startup_seconds"] = self._seconds_to_start() - started
        return row

    def _seconds_to_start(self) -> float:
        """What compiling kernels and capturing the step have taken so far."""
        return self._run_step.seconds if isinstance(self._run_step, GraphedStep) else 0.0

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _checked_step(self, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        """The step's figures; what goes wrong in it is a RunError that names it."""
        try:
            return self._run_step(x, y)
        except FloatingPointError as error:
            raise RunError(f"{_place(epoch, self.steps % self.steps_per_epoch)}: {error}") from error
        except CaptureError as error:
            raise RunError(
                f"the step cannot be captured as a CUDA graph, {error}; train with --no-cuda-graph"
            ) from error

    def _eager_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step: loss, score and gradient norm, float32 [3] on the device."""
        loss, score = self.data.loss(partial(self._forward, self._trained), x, y)
        loss.backward()
        norm = torch.as_tensor(self.step(), dtype=torch.float32, device=loss.device)
        figures = torch.stack((loss.detach().float(), score.float(), norm))
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    @torch.no_grad()
    def evaluate(self, part: str) -> tuple[float, float]:
        """Mean loss and the task's figure on "validation" or "test"."""
        self._signals.check()
        self.model.eval()
        forward, limit = partial(self._forward, self.model), self.config.eval_batches
        return self.data.evaluate(forward, part, limit, self._signals.check, self.ranks)

    def _train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(epoch, self.config.seed, self.config.batch_size, self.ranks)

    def _forward(self, network: nn.Module, *inputs: Any) -> Any:
        with autocast(self.device, self.config.precision):
            return network(*inputs)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self, name: str, payload: dict[str, Any]) -> None:
        whole = self.ranks.whole(payload | self.data.keep())
        self.ranks.on_first(lambda: checkpoint.save(self.out / name, whole))

    def _save_last(self) -> None:
        self._save(
            "last.pt",
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "initial_z": self.initial_z,
                "steps": self.steps,
                "recipe": self.recipe,
                "circumstances": self.circumstances,
            },
        )

    def _save_best(self) -> None:
        state = {"model": self.model.state_dict(), "row": self.best, "recipe": self.recipe}
        self._save("best.pt", state)

    def resume(self) -> list[str]:
        """Continue from `last.pt`; returns what differs from then, in words.

        Raises CheckpointError for a file that is damaged or does not fit, RunError for another recipe.
        """
        path = self.out / "last.pt"
        state = checkpoint.load(path, ("model", "optimizer", "history", "recipe", "steps"))
        if differences := _differences(state["recipe"], self.recipe):
            raise RunError(f"{path}: the run had another recipe: {'; '.join(differences)}")
        self._build(len(state["history"]) - 1)
        checkpoint.load_model(self.model, state["model"], path)
        checkpoint.load_optimizer(self.optimizer, state["optimizer"], path)
        self._prepare_step()
        self.history, self.steps, self.initial_z = state["history"], state["steps"], state["initial_z"]
        if self.history:  # best.pt may be newer than last.pt; its own row says what it is
            self.best = checkpoint.load(self.out / "best.pt", ("model", "row"))["row"]
        return _differences(state["circumstances"], self.circumstances)

    def load_best(self) -> None:
        """Put the weights of `best.pt` into the model. Nothing is exchanged."""
        path = self.out / "best.pt"
        state = checkpoint.load(path, ("model", "row"))
        self._build(state["row"]["epoch"] - 1)
        checkpoint.load_model(self.model, state["model"], path)
        self._prepare_step()


# -- helpers -------------------------------------------------------------------------------------


def open_run(out: Path, resume: bool) -> None:
    """Make the folder `out`, sure that it can be written and holds a run just when `resume` says so."""
    exists = (out / "last.pt").exists()
    if resume and not exists:
        raise RunError(f"--resume: no run in {out} (no last.pt)")
    if exists and not resume:
        raise RunError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    make_folder(out)


def make_folder(out: Path) -> None:
    """Make the folder `out`, sure that it can be written. Raises RunError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written, {error.strerror or error}") from error


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Where the network runs: in bfloat16 if `precision` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def derive_seed(seed: int, epoch: int, purpose: str, rank: int = 0) -> int:
    """A 63-bit seed, independent for every epoch, purpose and rank."""
    own = f"/{rank}" if rank else ""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}{own}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def constant(lr: float) -> Callable[[int, int], float]:
    """lr of every step."""
    return lambda epoch, step: lr


def cosine(epochs: int, lr: float, min_lr: float) -> Callable[[int, int], float]:
    """lr of an epoch: from `lr` down to `min_lr` after `epochs` epochs, as in CosineAnnealingLR."""
    return lambda epoch, step: min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential(lr: float, decay: float) -> Callable[[int, int], float]:
    """lr of an epoch: times `decay` after each, as in ExponentialLR."""
    return lambda epoch, step: lr * decay**epoch


def one_cycle(steps: int, lr: float, min_lr: float, warm_up: float) -> Callable[[int, int], float]:
    """lr of a step: a line up to `lr` over the share `warm_up` of all `steps`, then a line down to `min_lr`
    at the last step. Smith and Topin, "Super-convergence" (2018), with one line down."""
    rise = round(warm_up * steps)

    def rate(epoch: int, step: int) -> float:
        if step < rise:
            return lr * (step + 1) / rise
        fallen = (step - rise + 1) / (steps - rise)
        return lr + (min_lr - lr) * min(fallen, 1.0)

    return rate


def exponential_by_step(lr: float, decay: float, min_lr: float) -> Callable[[int, int], float]:
    """lr of a step: times `decay` after each, down to `min_lr`."""
    return lambda epoch, step: max(min_lr, lr * decay**step)


def piecewise(rates: Sequence[float], until: Sequence[float]) -> Callable[[int, int], float]:
    """lr of a step: `rates[i]` before step `until[i]`, the last one (of one more) from there on. `until` need
    not be whole: they may be shares of all steps."""
    if len(rates) != len(until) + 1:
        raise ValueError(f"rates must be one more than the {len(until)} of until, got {len(rates)}")
    return lambda epoch, step: rates[bisect.bisect_right(until, step)]


def plateau(
    lr: float, decay: float, patience: int, metric: Metric, history: Callable[[], Sequence[Row]]
) -> Callable[[int, int], float]:
    """lr of an epoch: times `decay` after more than `patience` epochs in a row without a better validation
    figure, as in ReduceLROnPlateau with threshold 0: any better figure counts (torch's default asks for one
    better by 1e-4 of it). history(): the epochs so far, which are all that it remembers."""

    def rate(epoch: int, step: int) -> float:
        now, best, waited = lr, None, 0
        for value in (metric.of(row, "validation") for row in history()):
            if best is None or metric.better(value, best):
                best, waited = value, 0
            else:
                waited += 1
            if waited > patience:
                now, waited = now * decay, 0
        return now

    return rate


def z_statistics(model: nn.Module) -> Row:
    """Smallest, largest, mean, std and norm of the embeddings of every generated layer: {"z/conv1/min":
    ...}."""
    by_layer = z_report(model).statistics()
    return {f"z/{name}/{key}": value for name, own in by_layer.items() for key, value in own.items()}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row, as of an epoch, written whole and atomically: a resumed run leaves no duplicate.
    Empty where a row has no such figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


class _Meter:
    """Sums of one epoch, over all ranks. Figures stay on the device for `window` steps, so a GPU is not
    stopped at each."""

    def __init__(self, epoch: int, window: int, device: torch.device, ranks: Ranks) -> None:
        self.epoch, self.pending = epoch, []  # counts of the steps whose figures are in the ring
        self.ranks = ranks
        self.ring = torch.empty(window, 3, device=device)
        self.steps = self.count = 0  # count: images or characters
        self.loss_sum = self.score = self.norm_sum = 0.0

    def add(self, figures: Tensor, count: int) -> None:
        """figures: loss, score and gradient norm of a step, float32 [3]."""
        self.ring[len(self.pending)].copy_(figures)
        self.pending.append(count)
        if len(self.pending) == len(self.ring):
            self.flush()

    def flush(self) -> None:
        """Take the pending values in; raises RunError at the first that is not finite."""
        everyones = self.ranks.gather(self.ring[: len(self.pending)]).tolist() if self.pending else [[]]
        for figures, count in zip(zip(*everyones, strict=True), self.pending, strict=True):
            losses, scores, norms = zip(*figures, strict=True)
            loss, score, norm = sum(losses) / len(losses), sum(scores), sum(norms) / len(norms)
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise RunError(f"{_place(self.epoch, self.steps)}: {name} is {value}")
            self.steps, self.count, self.score = self.steps + 1, self.count + count, self.score + score
            self.loss_sum, self.norm_sum = self.loss_sum + loss * count, self.norm_sum + norm
        self.pending.clear()

    @property
    def fresh(self) -> bool:
        return not self.pending

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count

    @property
    def norm(self) -> float:
        return self.norm_sum / self.steps


class _Stopwatch:
    """Adds up the time spent in `with` blocks: the host's, or on a GPU what the device took for them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.total, self.events = device.type == "cuda", 0.0, []

    def __enter__(self) -> None:
        self.began = self._now()

    def __exit__(self, *_: object) -> None:
        ended = self._now()
        if self.on_gpu:
            self.events.append((self.began, ended))
        else:
            self.total += ended - self.began

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """The sum so far; on a GPU all of it must be done."""
        return self.total + sum(began.elapsed_time(ended) for began, ended in self.events) / 1000


class _Signals:
    """SIGINT and SIGTERM are raised as Interrupted at the next `check`, on all ranks at the same one; a
    second one acts at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> _Signals:
        self.previous = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.ranks.received:
            raise KeyboardInterrupt
        self.ranks.received = number

    def check(self) -> None:
        if self.ranks.signal:
            raise Interrupted(self.ranks.signal)


def _place(epoch: int, step: int) -> str:
    return f"epoch {epoch + 1}, step {step + 1}"


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [*then, *(name for name in now if name not in then)]
    return [f"{n} was {then.get(n)}, now {now.get(n)}" for n in names if then.get(n) != now.get(n)]
