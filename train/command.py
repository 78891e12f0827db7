"""What the training commands share: options, checks, optimizer, the run from the command line to report.md.

A command (`train/cifar100.py`) has a module of its own with its models, recipes, published figures and data,
and a `Command` that puts them together. Options may be spelled with underscores too: `--batch_size`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

import hyperfast
from hyperfast.distributed import shard_
from hyperfast.nn import named_generators
from hyperfast.nn.generator import generators
from hyperfast.nn.init import DEFAULT, INITIALISATIONS
from train import report, summary
from train.allocator import keep_freed_memory
from train.checkpoint import CheckpointError, write_atomically
from train.data import DataError, ImageSet, split
from train.images import ImageData
from train.loop import Config, Interrupted, RunError, Stages, Trainer, open_run
from train.losses import WithCenters
from train.optimizers import NesterovSGD
from train.ranks import Ranks, goes_on, here, joined, launcher, lost, mark, processes, unmark, was_restarted
from train.task import Task

BETAS = (0.9, 0.999)
PARENT = "HYPERFAST_TRAIN_PARENT"  # set where another command runs this one: that one says how to go on
STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"}
MOMENTUM = 0.9
Built = tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor | float]]


@dataclass(frozen=True)
class Rule:
    """An optimizer of `torch.optim` by its name there. options: its own; graph: what it needs in a CUDA graph
    beside; fused: whether `hyperfast.optim` has it."""

    name: str
    options: dict[str, Any]
    graph: dict[str, Any]
    fused: bool = True


OPTIMIZERS = {
    "adamw": Rule("AdamW", {"betas": BETAS}, {"capturable": True, "fused": True}),
    "adam": Rule("Adam", {"betas": BETAS}, {"capturable": True, "fused": True}),
    "sgd": Rule("SGD", {"momentum": MOMENTUM}, {"fused": True}),
    "nesterov": Rule("SGD", {"momentum": MOMENTUM, "nesterov": True}, {}),  # of factored gradients
    "rmsprop": Rule("RMSprop", {}, {"capturable": True, "foreach": True}, fused=False),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; a command adds its own options. Each field is an option, None where the command
    line decides. clip: gradient norm. patience: epochs without a better validation accuracy, 0: any number.
    """

    optimizer: str = "adamw"
    schedule: str = "cosine"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    patience: int = 15


# -- options -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; an underscore in an option's name is a dash."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(text) for text in arguments], namespace)


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def number(kind: type, low: float, above: bool = False, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` from `low` (`above`: larger than it) to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if above else low <= value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}, got {text}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {text}")
        return value

    return parse


COUNT, RATE, POSITIVE = number(int, 1), number(float, 0), number(float, 0, above=True)


def add_run_options(
    p: Parser,
    data: str,
    models: Iterable[str],
    default: str,
    out: str,
    inits: Iterable[str] = INITIALISATIONS,
    init: str | None = DEFAULT,
) -> None:
    """The options of a run on images, but its recipe. data: the data set's name; out: of the run's folder;
    inits: how generators can start; init: how they do, None where the model decides."""
    add_loop_options(p, models, default, out)
    add = p.add_argument
    start = init or "the model's own"
    add("--init", choices=list(inits), default=init, help=f"how generators start ({start})")
    add("--generated-l2", type=RATE, default=0.0, metavar="C", help="C / 2 |w|^2 of every generated weight w")
    add("--data", type=Path, help=f"folder with {data}, torchvision's or the hub's Parquet layout; "
        "otherwise HYPERFAST_DATA, otherwise it is downloaded")  # fmt: skip
    accuracy = number(float, 0, above=True, high=100)
    add("--target-accuracy", type=accuracy, metavar="PERCENT", help="stop after the first epoch whose test "
        "accuracy reaches this, and say how long the training took")  # fmt: skip
    add("--save-frozen", action=argparse.BooleanOptionalAction, default=False, help="write the plain network "
        "of the best epoch, frozen.safetensors")  # fmt: skip


def add_loop_options(p: Parser, models: Iterable[str], default: str, out: str) -> None:
    """The options of any run, but its data and its recipe. out: of the run's folder."""
    add = p.add_argument
    boolean = argparse.BooleanOptionalAction
    add("--fused", action=boolean, default=True, help="hyperfast's kernels and optimizer, or plain PyTorch")
    add("--model", choices=list(models), default=default)
    add("--out", type=Path, help=f"folder of the run ({out})")
    add("--resume", action="store_true", help="continue the run in --out")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=found, help="cpu, cuda or cuda:N (cuda where there is one)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="fp32 (the default): float32, "
        "without TF32; tf32: matrix products and convolutions in TF32, on a GPU; bf16: autocast")  # fmt: skip
    add("--cuda-graph", action=boolean, help="the whole step as one CUDA graph (on a GPU: yes)")
    add("--threads", type=COUNT, help="CPU threads (torch's choice)")
    add("--seed", type=number(int, 0), default=42)
    add("--max-steps", type=COUNT, help="stop the run after so many steps")
    add("--eval-batches", type=COUNT, help="evaluate on so many batches only")
    add("--save-every", type=COUNT, default=1, help="epochs between two last.pt (%(default)s)")
    add("--timeout", type=COUNT, default=600, metavar="SECONDS", help="of several processes (torchrun): how "
        "long they wait for one that does not answer, at their start, while another reads or downloads the "
        "data, in a step, while the first saves; the report has no limit (%(default)s)")  # fmt: skip
    p.set_defaults(shard_generator=False)


def add_state_option(p: Parser) -> None:
    """For commands with factored generators; the others have state_dtype fp32."""
    p.add_argument(
        "--state-dtype",
        choices=list(STATE_DTYPES),
        default="fp32",
        help="how the moments of generators are stored; needs --fused (%(default)s)",
    )


def add_shard_option(p: Parser) -> None:
    """For commands with generators that can be sharded; their `Command` has build."""
    p.add_argument("--shard-generator", action="store_true", help="of several processes (torchrun), each "
        "keeps its own rows of the generators, with their optimizer's states, instead of all")  # fmt: skip


NOT_SHARDED = "--shard-generator: {} has no generator larger than what it makes"


def add_recipe_options(
    p: Parser,
    recipes: Collection[str],
    help: str,
    schedules: Collection[str],
    patience: str = "--patience",
    figure: str = "accuracy",
    optimizers: Collection[str] = ("adamw", "adam"),
) -> Callable[..., argparse.Action]:
    """The options of `Recipe`, None where the recipe decides; returns what adds more of them.

    help: what the `recipes` are; the first is the default. patience: the option's name; figure: what is
    waited for. optimizers: names in OPTIMIZERS.
    """
    add = p.add_argument_group("recipe (each model has its own, see below)").add_argument
    add("--recipe", choices=list(recipes), default=next(iter(recipes)), help=help)
    add("--optimizer", choices=list(optimizers))
    add("--schedule", choices=list(schedules), help="of the learning rate")
    add("--epochs", type=COUNT)
    add("--batch-size", type=COUNT, help="of all processes together")
    add("--lr", type=POSITIVE)
    add("--weight-decay", type=RATE)
    add("--clip", type=POSITIVE, help="gradient norm")
    add(patience, type=number(int, 0), dest="patience", metavar="PATIENCE", help="epochs without a better "
        f"validation {figure}, 0: any number")  # fmt: skip
    return add


def describe_recipes(recipes: Mapping[str, Mapping[str, Recipe]], names: Mapping[str, str] = {}) -> str:
    """All recipes by name and model, in one paragraph. names: of options that are not those of the fields."""

    def each() -> Iterator[str]:
        for kind, by_model in recipes.items():
            for recipe in dict.fromkeys(by_model.values()):
                values = ", ".join(
                    f"{names.get(name, name).replace('_', '-')} {value}"
                    for name, value in vars(recipe).items()
                )
                models = ", ".join(name for name, own in by_model.items() if own == recipe)
                yield f"{kind} for {models}: {values}."

    return " ".join(each())


def fill_in(
    args: argparse.Namespace, options: Parser, recipes: Mapping[str, Mapping[str, Recipe]], out: str
) -> None:
    """Sets what was not given: the recipe's values, the run's folder `out`_MODEL, cuda_graph. Exits with one
    line for a model without such a recipe, for options that do not go together, and for an environment that
    is not torchrun's."""
    by_model = recipes[args.recipe]
    if args.model not in by_model:
        options.error(f"--recipe {args.recipe} is for {', '.join(by_model)}, not for {args.model}")
    for name, value in vars(by_model[args.model]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"{out}_{args.model}"
    if args.state_dtype != "fp32" and not args.fused:
        options.error(f"--state-dtype {args.state_dtype} needs --fused")
    if args.shard_generator and not (args.fused and OPTIMIZERS[args.optimizer].fused):
        options.error("--shard-generator needs --fused and an optimizer that takes factored gradients")
    try:
        several = processes() > 1 or args.shard_generator
    except RunError as error:
        options.error(str(error))
    on_gpu = args.device.partition(":")[0] == "cuda"
    if not on_gpu and args.cuda_graph:
        options.error(f"--cuda-graph needs --device cuda, got {args.device}")
    if not on_gpu and args.precision == "tf32":
        options.error(f"--precision tf32 needs --device cuda, got {args.device}")
    if several and args.cuda_graph:
        options.error("--cuda-graph is for one process with whole generators: else no step is captured")
    if args.cuda_graph is None:
        args.cuda_graph = on_gpu and not several


# -- device --------------------------------------------------------------------------------------


def check_device(name: str) -> None:
    """Makes a GPU the current one. Raises RunError for a device that does not exist here."""
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_precision(precision: str) -> None:
    """How a GPU multiplies float32: in TF32 only where `precision` is "tf32". torch's own default has TF32 in
    convolutions. cuDNN tries its algorithms once for each shape: shapes are fixed."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def set_up_device(args: argparse.Namespace) -> None:
    """Device, precision and threads as the options say. Raises RunError."""
    check_device(args.device)
    if torch.device(args.device).type == "cuda":
        set_precision(args.precision)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)


# -- parts of a run ------------------------------------------------------------------------------


def image_data(
    data: ImageSet,
    validation: int,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    normalize: Callable[[Tensor], Tensor],
    **options: Any,
) -> tuple[ImageData, int]:
    """The three parts, `validation` of the training images apart, and a check sum of the labels: it tells
    other data or another order. options: of `ImageData`, criterion and mix."""
    images, labels = data.train_images, data.train_labels
    parts = [(images[index], labels[index]) for index in split(len(labels), validation, seed)]
    checksum = zlib.crc32(torch.cat((labels, data.test_labels)).to(torch.uint8).numpy())
    test = data.test_images, data.test_labels
    return ImageData(*parts, test, augment, normalize, **options), checksum


def placed(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """`model` on the run's device, convolutions in channels_last; with --shard-generator, of its generators
    the rows of this process alone. The optimizer is made of what this returns. Raises RunError."""
    if args.shard_generator:
        try:
            shard_(model)
        except ValueError as error:
            raise RunError(f"--shard-generator: {error}") from error
        if not any(generator.shard for _, generator in generators(model)):
            raise RunError(NOT_SHARDED.format(args.model))
    return model.to(args.device, memory_format=torch.channels_last)


def make_optimizer(
    model: nn.Module, args: argparse.Namespace, groups: list[dict] | None = None
) -> tuple[torch.optim.Optimizer, Callable[[], Tensor | float]]:
    """Optimizer with clipping, fused or plain, and what makes a step and returns the norm.

    groups: of all parameters, where their options differ. In a CUDA graph both leave the norm on the device.
    The fused one then skips a step without a finite norm instead of raising; the plain one takes it, as it
    does without a graph. Without factored gradients "nesterov" is `NesterovSGD`, fused or not.
    """
    rule = OPTIMIZERS[args.optimizer]
    options: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay, **rule.options}
    trained = groups or list(model.parameters())
    own = args.optimizer == "nesterov" and not any(g.factored for _, g in named_generators(model))
    if args.fused and rule.fused and not own:
        capturable = {"capturable": True, "nonfinite": "skip"} if args.cuda_graph else {}
        options |= {"max_grad_norm": args.clip, "state_dtype": STATE_DTYPES[args.state_dtype]}
        fused = getattr(hyperfast.optim, rule.name)(trained, **options, **capturable)

        def fused_step() -> Tensor | float:
            fused.step()
            return fused.grad_norm

        return fused, fused_step
    if own:
        del options["nesterov"]
        plain = NesterovSGD(trained, **options, capturable=args.cuda_graph)
    else:
        plain = getattr(torch.optim, rule.name)(trained, **options, **(rule.graph if args.cuda_graph else {}))

    def plain_step() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        plain.step()
        return norm

    return plain, plain_step


def make_trainer(
    args: argparse.Namespace,
    data: Task,
    built: Built,
    schedule: Callable[[int, int], float],
    recipe: dict[str, Any],
    stages: Stages | None = None,
    circumstances: dict[str, Any] | None = None,
) -> Trainer:
    """The loop of `built`, from `torch.manual_seed(args.seed)` on. recipe: what must be equal on resume
    beside the options that must be in every run. circumstances: what may differ beside those that may in
    every run, by default patience."""

    def values(*names: str) -> dict[str, Any]:  # of options that this command has
        return {name: getattr(args, name) for name in names if name in args}

    recipe = values("model", "init", "precision", "state_dtype") | recipe
    recipe |= values("seed", "eval_batches", "generated_l2")
    own = values("patience") if circumstances is None else circumstances
    circumstances = values("fused", "device", "cuda_graph", "shard_generator") | own
    circumstances |= {"ranks": here().count} | values("max_steps", "target_accuracy", "save_every")
    circumstances |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    config = Config(
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        patience=args.patience or None,
        precision=args.precision,
        device=args.device,
        cuda_graph=args.cuda_graph,
        target=getattr(args, "target_accuracy", None),
        max_steps=args.max_steps,
        eval_batches=args.eval_batches,
        save_every=args.save_every,
    )
    model, optimizer, step = built
    return Trainer(model, data, optimizer, step, schedule, config, args.out, recipe, circumstances, stages)


def recipe_values(args: argparse.Namespace, kind: type[Recipe]) -> dict[str, Any]:
    """The options of a recipe of this `kind` that a resumed run must have had; patience may differ."""
    names = kind.__dataclass_fields__
    return {name: getattr(args, name) for name in names if name != "patience"}


def save_frozen(model: nn.Module, path: Path) -> None:
    """The plain network as safetensors: generated weights under their layers' names, float32."""
    model = model.network if isinstance(model, WithCenters) else model
    content = safetensors.torch.save(hyperfast.nn.plain_state_dict(model), {"format": "pt"})
    write_atomically(path, lambda file: file.write(content))


# -- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """`python -m train.NAME`. title: of its data set, in reports.

    parser() makes the options, parse(arguments) gives them complete. make_trainer(args) reads the data and
    builds the loop; it may raise CheckpointError, DataError, RunError. published(args): what was reported of
    this very model, if anything. extra(trainer, args): sections of report.md, Markdown, of a run that has
    ended; pictures go into trainer.out. alone: options with which it trains the one model and no other.
    called(args): what it trains, in the report's title. build(args): network, optimizer and step function,
    where they can be sharded.
    """

    name: str
    title: str
    models: tuple[str, ...]
    parser: Callable[[], Parser]
    parse: Callable[[Sequence[str]], argparse.Namespace]
    make_trainer: Callable[[argparse.Namespace], Trainer]
    published: Callable[[argparse.Namespace], report.Published | None]
    extra: Callable[[Trainer, argparse.Namespace], str] = lambda trainer, args: ""
    alone: tuple[str, ...] = ()
    called: Callable[[argparse.Namespace], str] = lambda args: args.model
    build: Callable[[argparse.Namespace], Built] | None = None

    def line(self, arguments: Sequence[str]) -> str:
        """The command that has these arguments, as it stands in reports."""
        return f"{launcher()} -m train.{self.name} {shlex.join(arguments)}".strip()

    def run(self, args: argparse.Namespace, command: str) -> Trainer:
        """Train and report; returns the trainer with its records and, on the first rank, the best epoch's
        weights.

        args: from `parse`. Raises RunError, CheckpointError, DataError, Interrupted, that also where a
        signal comes between the epochs.
        """
        try:
            with joined(args) as ranks:
                trainer, reason = self._train(args, ranks)
            if ranks.first:  # nothing is exchanged any more: nobody waits
                self._report(trainer, args, command, reason)
                unmark(args.out)
            return trainer
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT) from None
        except BrokenPipeError:
            raise Interrupted(signal.SIGPIPE) from None

    def _train(self, args: argparse.Namespace, ranks: Ranks) -> tuple[Trainer, str]:
        """The trained loop, and why it ended."""
        if args.shard_generator and not ranks.joined:
            raise RunError("--shard-generator: there is one process alone; start several with torchrun")
        ranks.together(lambda: set_up_device(args))
        restarted = was_restarted(ranks)
        args.resume = ranks.on_first(lambda: _open(args, restarted))
        try:
            trainer = ranks.together(lambda: self._prepare(args))
        except BaseException:
            with contextlib.suppress(OSError):
                args.out.rmdir()  # if it is empty: bad input leaves no folder
            raise

        def begin() -> None:
            summary.discard(args.out)
            mark(args.out)

        ranks.on_first(begin)
        return trainer, trainer.fit()

    def _prepare(self, args: argparse.Namespace) -> Trainer:
        """The loop where it begins."""
        trainer = self.make_trainer(args)
        if args.resume:
            for difference in trainer.resume():
                print(f"note: {difference}")
            print(f"resumed {args.out} after epoch {len(trainer.history)}")
        return trainer

    def _report(self, trainer: Trainer, args: argparse.Namespace, command: str, reason: str) -> None:
        if args.shard_generator:  # a whole network, for this process alone
            whole = argparse.Namespace(**vars(args) | {"shard_generator": False})
            trainer.model, trainer.optimizer, trainer.step = self.build(whole)
        trainer.load_best()
        print(f"writing {args.out / 'report.md'}", flush=True)
        frozen = args.out / "frozen.safetensors" if getattr(args, "save_frozen", False) else None
        if frozen:
            save_frozen(trainer.model, frozen)
        title = f"{self.title}, {self.called(args)}"
        extra = self.extra(trainer, args)
        path = report.write(trainer, title, reason, command, self.published(args), frozen, extra)
        metric, best, part = trainer.metric, trainer.best, trainer.reported
        if reached := trainer.target_row():
            reason += f", {reached['training_seconds']:.1f} s of training"
        figure = f"{part} {metric.words} {metric.cell(best, part)}"
        print(f"{reason}; {figure} at the best validation epoch, {best['epoch']}; {path}")

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Exit status: 0, 2 after an error (one line on stderr, of each process), 128 + signal after an
        interruption."""
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        args = self.parse(arguments)
        command = self.line(arguments)

        def work() -> int:
            self.run(args, command)
            return 0

        return exit_status(work, lambda: _how_to_go_on(args, command))


def exit_status(work: Callable[[], int], how_to_go_on: Callable[[], str]) -> int:
    """work()'s, or 2 after an error (one line on stderr, of each process), 128 + signal after an
    interruption, which the first one tells."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has enough
        _mute()
        return 128 + signal.SIGPIPE
    except (RunError, CheckpointError, DataError, OSError) as error:
        _say(f"error: {error}")
        return 2
    except RuntimeError as error:
        reason = lost(error)
        if reason is None:
            raise
        _say(f"error: {reason}; {how_to_go_on()}")
        return 2
    except Interrupted as stop:
        if stop.number == signal.SIGPIPE:
            _mute()
        if here().first and os.environ.get("RANK", "0") == "0":
            print(f"\nstopped by {stop}; {how_to_go_on()}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _open(args: argparse.Namespace, restarted: bool) -> bool:
    """Opens args.out; whether the run there is continued."""
    resume = args.resume or goes_on(args.out, restarted)
    open_run(args.out, resume)
    return resume


def _say(line: str) -> None:
    """On stderr, whole where several processes do, each with its rank."""
    who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    sys.stderr.write(f"{who}{line}\n")


def _mute() -> None:
    """Nothing more goes to a stdout that nobody reads, at the program's end neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _how_to_go_on(args: argparse.Namespace, command: str) -> str:
    """What an interrupted run left, and the command that continues it or starts it again."""
    saved = (args.out / "last.pt").exists()
    left = f"{args.out} holds the last epoch's end." if saved else "no epoch was saved."
    if PARENT in os.environ:
        return left
    again = f"{command} --resume" if saved and not args.resume else command
    return f"{left} Continue with: {again}"
