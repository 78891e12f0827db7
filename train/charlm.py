"""Character language models, LSTM and HyperLSTM: `python -m train.charlm --data-path FILE`.

`--mode train` (the default) trains on a text file or on the character-level Penn Treebank, `--mode eval
--load-model best.pt` measures bits per character, `--mode generate --load-model best.pt` writes text. A
checkpoint knows its model's options and its vocabulary.

Ha, Dai, Le, "HyperNetworks" (ICLR 2017), bits per character on the test part of Penn Treebank: LSTM of 1000
units 1.312, with layer norm 1.267; HyperLSTM 1.265, with layer norm 1.250. `--recipe paper` has the paper's
sizes, dropout and optimizer. What the paper does not say is our choice: 200 epochs, of which the best by
validation counts, and that each begins at another place of the text with a state of zeros. Without it a run
trains as the public version's report does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hyperfast.analysis import table
from train import checkpoint, command
from train.checkpoint import CheckpointError
from train.command import (
    COUNT,
    Command,
    Parser,
    fill_in,
    make_optimizer,
    number,
    placed,
    recipe_values,
    set_up_device,
)
from train.dynamics import text_dynamics
from train.generate_text import sample
from train.language import BPC, TextData, vocabulary_of
from train.loop import RunError, Trainer, autocast, constant, plateau
from train.models.charlm import MODELS, CharLM
from train.ranks import alone
from train.report import save_figure
from train.task import Row
from train.text import Vocabulary, load_text

MODEL_OPTIONS = {  # that make a model, and what `CharLM` calls them
    "model": "kind",
    "embedding_size": "embedding_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "hyper_num_units": "hyper_size",
    "hyper_embedding_size": "hyper_embedding_size",
}


RENAMED = {"patience": "early-stopping"}  # options that are not called as the recipe's fields


@dataclass(frozen=True)
class Recipe(command.Recipe):
    """How a model is trained. schedule: plateau, lr times lr_decay after more than lr_patience epochs without
    a better validation figure, or constant. seq_length: T, characters of a step. embedding_size: 0 for
    one-hot vectors. dropout: of the input and of what every layer puts out. dropout_keep_prob: of the
    candidates in the cells, where use_recurrent_dropout says so."""

    optimizer: str = "adam"
    schedule: str = "plateau"
    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 5.0
    patience: int = 0
    lr_decay: float = 0.5
    lr_patience: int = 3
    seq_length: int = 100
    embedding_size: int = 128
    hidden_size: int = 512
    num_layers: int = 1
    dropout: float = 0.1
    hyper_num_units: int = 128
    hyper_embedding_size: int = 16
    use_recurrent_dropout: bool = False
    dropout_keep_prob: float = 0.9


PAPER = Recipe(
    schedule="constant", epochs=200, batch_size=128, clip=1.0, embedding_size=0, hidden_size=1000,
    hyper_embedding_size=4, use_recurrent_dropout=True,
)  # fmt: skip
RECIPES = {"report": dict.fromkeys(MODELS, Recipe()), "paper": dict.fromkeys(MODELS, PAPER)}
History = Callable[[], Sequence[Row]]
SCHEDULES: dict[str, Callable[[argparse.Namespace, History], Callable[[int, int], float]]] = {
    "plateau": lambda args, history: plateau(args.lr, args.lr_decay, args.lr_patience, BPC, history),
    "constant": lambda args, history: constant(args.lr),
}
# that a published figure belongs to: all of a recipe but for how long it goes on
COMPARED = ("model", *(name for name in Recipe.__dataclass_fields__ if name not in (
    "epochs", "patience", "lr_decay", "lr_patience")))  # fmt: skip


@dataclass
class Published:
    """Bits per character on the test part of Penn Treebank, and millions of parameters, of a model that is
    trained with these options, those COMPARED."""

    bpc: float
    parameters: float
    options: dict[str, Any]
    megabytes: float | None = None
    z_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    what: str = "Ha, Dai, Le"


def _paper(model: str, **options: int) -> dict[str, Any]:
    return {"model": model, **vars(PAPER), **options}


PUBLISHED = {
    "LSTM 1000": Published(1.312, 4.25, _paper("lstm")),
    "layer-norm LSTM 1000": Published(1.267, 4.26, _paper("ln_lstm")),
    "HyperLSTM 1000": Published(1.265, 4.91, _paper("hyper_lstm")),
    "layer-norm HyperLSTM 1000": Published(1.250, 4.92, _paper("ln_hyper_lstm")),
    "with N_z = 16": Published(1.233, 5.06, _paper("ln_hyper_lstm", hyper_embedding_size=16)),
    "two layers": Published(1.219, 14.41, _paper("ln_hyper_lstm", num_layers=2, hyper_embedding_size=16)),
}


# -- the command line ----------------------------------------------------------------------------


def parser() -> Parser:
    """The command line; None where the recipe decides."""
    p = Parser(
        "python -m train.charlm",
        description="Train a character language model, measure it, or let it write.",
        epilog="Recipes. " + command.describe_recipes(RECIPES, RENAMED),
    )
    add = p.add_argument
    add("--mode", choices=("train", "eval", "generate"), default="train", help="what to do (%(default)s)")
    command.add_loop_options(p, MODELS, "hyper_lstm", "runs/charlm_MODEL")
    p.set_defaults(state_dtype="fp32")  # nothing here is factored
    add("--use-layer-norm", action="store_true", help="--model lstm is ln_lstm, hyper_lstm is ln_hyper_lstm")
    add("--data-path", "--data", dest="data", type=Path, metavar="PATH", help="a text file, or a folder with "
        "ptb.char.train.txt, ptb.char.valid.txt and ptb.char.test.txt (there or in text/ptb); otherwise "
        "HYPERFAST_DATA")  # fmt: skip
    add("--val-split", type=number(float, 0, above=True), help="share of a text file, its end, for "
        "validation (0.1); eval: of another text than the training's (all of it)")  # fmt: skip
    add("--load-model", type=Path, metavar="FILE", help="best.pt or last.pt of a run: what to measure or "
        "what writes; in training where to start from: weights, and the model's options that are not "
        "given")  # fmt: skip
    own = command.add_recipe_options(
        p, RECIPES, "report: the public version's (the default); paper: the paper's, for Penn Treebank",
        SCHEDULES, f"--{RENAMED['patience']}", "figure",
    )  # fmt: skip
    share = number(float, 0, above=True, high=1)
    own("--lr-decay", type=share, metavar="FACTOR", help="of the schedule plateau")
    own("--lr-patience", "--patience", type=number(int, 0), help="epochs without a better validation figure "
        "that the schedule plateau waits for")  # fmt: skip
    own("--seq-length", type=COUNT, metavar="T", help="characters of a step in each row of the batch")
    own("--embedding-size", type=number(int, 0), metavar="N", help="of the input, 0: one-hot vectors")
    own("--hidden-size", type=COUNT, metavar="N", help="units of a layer")
    own("--num-layers", type=COUNT, metavar="N")
    own("--dropout", type=number(float, 0), metavar="SHARE", help="of the input and every layer's output")
    own("--hyper-num-units", type=COUNT, metavar="N", help="units of the hyper LSTM")
    own("--hyper-embedding-size", type=COUNT, metavar="N", help="N_z, of each gate's embeddings")
    own("--use-recurrent-dropout", action=argparse.BooleanOptionalAction, help="drop candidates in the cells")
    own("--dropout-keep-prob", type=share, metavar="SHARE", help="of the candidates that stay")
    text = p.add_argument_group("--mode generate, and the sample in report.md").add_argument
    text("--prime-text", default="", metavar="TEXT", help="what is continued")
    text("--temperature", type=number(float, 0), default=1.0, help="of the draws, 0: always the likeliest "
         "character (%(default)s)")  # fmt: skip
    text("--gen-length", type=COUNT, default=1000, metavar="N", help="characters (%(default)s); a --seed "
         "always draws the same ones")  # fmt: skip
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the recipe filled in. Exits with status 2 and one line for bad ones.

    asked: the options of MODEL_OPTIONS that were given.
    """
    options = parser()
    default = options.get_default("model")
    options.set_defaults(model=None)
    args = options.parse_args(arguments)
    asked = {name: getattr(args, name) for name in MODEL_OPTIONS}
    args.model = args.model or default
    if args.use_layer_norm:
        args.model = f"ln_{args.model.removeprefix('ln_')}"
        asked["model"] = args.model
    args.asked = {name: value for name, value in asked.items() if value is not None}
    if args.mode != "train" and args.load_model is None:
        options.error(f"--mode {args.mode} needs --load-model FILE, best.pt of a run")
    if args.mode != "train" and args.resume:
        options.error(f"--resume is for --mode train, not for {args.mode}")
    if args.val_split is not None and args.val_split >= 1:
        options.error(f"argument --val-split: must be below 1, got {args.val_split}")
    given = {name for name in Recipe.__dataclass_fields__ if getattr(args, name) is not None}
    if args.mode != "train" and (own := sorted(given - set(MODEL_OPTIONS))):
        names = ", ".join(f"--{RENAMED.get(name, name).replace('_', '-')}" for name in own)
        options.error(f"{names}: for --mode train, not for {args.mode}")
    if args.load_model and "model" not in args.asked:
        args.out = args.out or Path("runs") / "charlm_continued"  # the file knows the model
    fill_in(args, options, RECIPES, "charlm")
    if "dropout_keep_prob" in given and not args.use_recurrent_dropout:
        options.error("--dropout-keep-prob needs --use-recurrent-dropout")
    if args.dropout >= 1:
        options.error(f"argument --dropout: must be below 1, got {args.dropout}")
    return args


# -- training ------------------------------------------------------------------------------------


def build(options: dict[str, Any], vocabulary: Vocabulary, fused: bool) -> CharLM:
    """The model with these options, of a command line or of a checkpoint's recipe."""
    sizes = {name: options[option] for option, name in MODEL_OPTIONS.items()}
    kept = options["dropout_keep_prob"] if options["use_recurrent_dropout"] else 1.0
    dropouts = {"dropout": options["dropout"], "recurrent_dropout": 1 - kept}
    return CharLM(vocabulary=len(vocabulary), **sizes, **dropouts, fused=fused)


def load(path: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], Vocabulary, dict[str, torch.Tensor]]:
    """Recipe, vocabulary and weights of a checkpoint. Raises CheckpointError, also where another model is
    asked for."""
    state = checkpoint.load(path, ("model", "recipe"))
    vocabulary, recipe = vocabulary_of(state, path), state["recipe"]
    if missing := [name for name in (*COMPARED, "val_split", "text_checksum") if name not in recipe]:
        raise CheckpointError(f"{path}: the recipe in it has no {', '.join(missing)}")
    if recipe["model"] not in MODELS:
        raise CheckpointError(f"{path}: unknown model {recipe['model']!r}, not one of {', '.join(MODELS)}")
    hyper = MODELS[recipe["model"]].hyper
    differ = [
        f"--{name.replace('_', '-')} {value}, it has {recipe[name]}"
        for name, value in asked.items()
        if recipe[name] != value and (hyper or not name.startswith("hyper_"))
    ]
    if differ:
        raise CheckpointError(f"{path} is another model: {'; '.join(differ)}")
    return recipe, vocabulary, state["model"]


def make_trainer(args: argparse.Namespace) -> Trainer:
    """Data, model, optimizer and loop of the recipe. Raises DataError, CheckpointError, RunError."""
    source = args.out / "last.pt" if args.resume else args.load_model
    start = load(source, args.asked) if source else None
    if start:  # what was not asked for is as it was
        vars(args).update((name, start[0][name]) for name in MODEL_OPTIONS)
    val_split = args.val_split or 0.1
    text = load_text(args.data, val_split, start and start[1])
    text.vocabulary.encode(args.prime_text, "--prime-text")  # what the report's sample continues
    args.text = text.name
    data = TextData(text, args.seq_length)
    torch.manual_seed(args.seed)
    model = build(vars(args), text.vocabulary, args.fused)
    if start:
        checkpoint.load_model(model, start[2], source)
    model = placed(model, args)
    recipe = recipe_values(args, Recipe) | {"val_split": val_split, "text_checksum": data.checksum}
    circumstances = {"early_stopping": args.patience, "text": text.name}
    circumstances |= {"load_model": str(args.load_model or "none")}
    built = model, *make_optimizer(model, args)
    schedule = SCHEDULES[args.schedule](args, lambda: trainer.history)
    trainer = command.make_trainer(args, data, built, schedule, recipe, circumstances=circumstances)
    return trainer


# -- a trained model -----------------------------------------------------------------------------


def load_trained(args: argparse.Namespace) -> tuple[dict[str, Any], Vocabulary, CharLM]:
    """Recipe, vocabulary and model of --load-model, in evaluation mode on its device. Raises CheckpointError,
    RunError."""
    set_up_device(args)
    recipe, vocabulary, weights = load(args.load_model, args.asked)
    model = build(recipe, vocabulary, args.fused)
    checkpoint.load_model(model, weights, args.load_model)
    return recipe, vocabulary, model.to(args.device).eval()


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Prints and returns bits per character of --load-model on the parts of the text that it is not trained
    on: another text file is measured whole, or its last --val-split."""
    recipe, vocabulary, model = load_trained(args)
    device = torch.device(args.device)
    data = unseen(args, recipe, vocabulary).to(device)

    def forward(*inputs: Any) -> Any:
        with autocast(device, args.precision):
            return model(*inputs)

    bpc = {part: data.evaluate(forward, part, args.eval_batches, lambda: None)[1] for part in data.parts}
    rows = []
    for part, figure in bpc.items():
        name = part if len(data.text.train) else "text"
        rows.append([name, f"{data.targets(part, args.eval_batches):,}", data.metric.text(figure)])
    print(f"{recipe['model']} ({args.load_model}) on {data.text.name}, {args.precision}\n")
    print(table(["part", "characters predicted", data.metric.words], rows))
    return bpc


def unseen(args: argparse.Namespace, recipe: dict[str, Any], vocabulary: Vocabulary) -> TextData:
    """The text to measure a model of this recipe on. Raises RunError where a part of it is trained on."""
    text = load_text(args.data, recipe["val_split"], vocabulary)
    data = TextData(text, recipe["seq_length"])
    if text.test is not None:
        return data
    if data.checksum != recipe["text_checksum"]:
        whole = torch.cat((text.train, text.validation))
        start = len(whole) - int(len(whole) * (args.val_split or 1))
        text = dataclasses.replace(text, train=whole[:0], validation=whole[start:])
        return TextData(text, recipe["seq_length"])
    if args.val_split not in (None, recipe["val_split"]):
        raise RunError(
            f"--val-split {args.val_split:g}: all of this text but its last {recipe['val_split']:g} is what "
            "the model is trained on"
        )
    return data


def generate(args: argparse.Namespace) -> None:
    """Writes --prime-text and what follows it, each character as soon as it is drawn."""
    _, vocabulary, model = load_trained(args)
    try:
        drawn = sample(model, vocabulary, args.gen_length, args.prime_text, args.temperature, args.seed)
        print(end=args.prime_text)
        with autocast(torch.device(args.device), args.precision):
            for character in drawn:
                print(end=character, flush=True)
        print()
    except ValueError as error:
        raise RunError(str(error)) from error


# -- report.md -----------------------------------------------------------------------------------


def published(options: dict[str, Any]) -> Published | None:
    """What was published of the model with these options, trained with them on the text that they name."""
    hyper = MODELS[options["model"]].hyper
    names = [name for name in COMPARED if hyper or not name.startswith("hyper_")]
    return next(
        (
            row
            for row in PUBLISHED.values()
            if options["text"] == "ptb" and all(row.options[name] == options[name] for name in names)
        ),
        None,
    )


def own_sections(trainer: Trainer, args: argparse.Namespace) -> str:
    """What report.md says beyond the usual."""
    sections = [_parts(trainer.model), _published_table(trainer, args), _sample(trainer, args)]
    if MODELS[args.model].hyper:
        sections.append(_dynamics(trainer))
    return "\n".join(sections)


def _parts(model: CharLM) -> str:
    """Parameters by what they are for."""
    counts = {"embedding": 0, "LSTM": 0, "hyper LSTM and its maps": 0, "output": 0}
    for name, p in model.named_parameters():
        part, _, rest = name.partition(".")
        if part == "lstm":
            hyper = rest.rpartition(".")[2].startswith(("hyper_", "z_", "d_"))
            part = "hyper LSTM and its maps" if hyper else "LSTM"
        counts[part] += p.numel()
    rows = [[part, f"{count:,}"] for part, count in counts.items() if count]
    return f"## Parameters by part\n\n{table(['part', 'parameters'], rows)}\n"


def _published_table(trainer: Trainer, args: argparse.Namespace) -> str:
    """The paper's figures, and this run's beside those of its model."""
    mine, count = published(vars(args)), sum(p.numel() for p in trainer.model.parameters())
    rows = []
    for name, row in PUBLISHED.items():
        ours = (
            [trainer.metric.cell(trainer.best, "test"), f"{count / 1e6:.2f} M"] if row is mine else ["", ""]
        )
        rows.append([name, f"{row.bpc:.3f}", f"{row.parameters:.2f} M", *ours])
    header = ["model", "test BPC, published", "parameters, published", "test BPC", "parameters"]
    return (
        f'## Published\n\n{table(header, rows)}\n\nHa, Dai, Le, "HyperNetworks" (ICLR 2017), Penn Treebank, '
        "recipe `paper`. A run on another text, of other sizes or with another recipe, but for its epochs, "
        "has no figures here.\n"
    )


def _sample(trainer: Trainer, args: argparse.Namespace) -> str:
    """Text that the best epoch's model writes."""
    vocabulary = trainer.data.text.vocabulary
    drawn = sample(trainer.model, vocabulary, args.gen_length, args.prime_text, args.temperature, args.seed)
    text = "".join([args.prime_text, *drawn])
    lines = "\n".join(f"    {line}" for line in text.split("\n"))
    how = f"Temperature {args.temperature:g}, seed {args.seed}, after epoch {trainer.best['epoch']}"
    return f"## Sample\n\n{how}:\n\n{lines}\n"


def _dynamics(trainer: Trainer) -> str:
    """Where in the validation text the weights change; the text itself in dynamics.png."""
    text = trainer.data.text
    changes = text_dynamics(trainer.model, text.vocabulary, text.validation)
    save_figure(changes.figure(), trainer.out / "dynamics.png")
    return (
        "## Where the weights change\n\n![text, each character coloured by the change](dynamics.png)\n\n"
        f"In the validation text, after epoch {trainer.best['epoch']}. {changes.to_markdown()}\n"
    )


class CharLMCommand(Command):
    """The command, with two other things to do than to train."""

    def run(self, args: argparse.Namespace, command: str) -> Trainer | None:
        if args.mode == "train":
            return super().run(args, command)
        alone(f"--mode {args.mode}")
        {"eval": evaluate, "generate": generate}[args.mode](args)
        return None


COMMAND = CharLMCommand(
    "charlm",
    "Characters",
    tuple(MODELS),
    parser,
    parse,
    make_trainer=make_trainer,
    published=lambda args: published(vars(args)),
    extra=own_sections,
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    sys.exit(main())
