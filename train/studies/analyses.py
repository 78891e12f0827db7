"""The parts of a study that look at networks: learning rates, landscape, gradients, activations, weights.

Each analysis is made of every network of the study at initialisation and trained (best epoch), all on the
same batches of training images without augmentation, in an order drawn from the seed. Gradients and
activations are those of the training mode's batch norm, by the statistics of the batch, without dropout; the
trainings of learning rates and landscape have dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import hyperfast
from hyperfast import analysis
from hyperfast.analysis import table
from train import vgg
from train.data import batches
from train.loop import derive_seed, write_csv
from train.report import save_figure
from train.studies import pictures
from train.studies.study import BATCH, Figures, Study
from train.studies.trainings import models
from train.studies.verdict import STATES, Quantity, Values

Results = dict[str, dict[str, Any]]  # by state and model
Batches = Sequence[tuple[Tensor, Tensor]]
MOMENTUM, DECAY = 0.9, 5e-4
AVERAGED = 5  # 0.05 for 100 steps of the range test: the share of the range that the loss is averaged over


class Subjects:
    """The networks of a study and the batches they are looked at with, made as they are asked for."""

    def __init__(self, study: Study) -> None:
        self.study, self.effort = study, study.effort
        self._networks: dict[tuple[str, str], nn.Module] = {}

    def _options(self, model: str) -> Any:
        (choice,) = models([model]).choices
        return vgg.parse(self.study.plan(choice.folder, model, choice.arguments).arguments)

    @cached_property
    def batches(self) -> Batches:
        """As many as the study looks at, of BATCH images if there are so many."""
        study, options = self.study, self._options(self.study.options.models[0])
        data = vgg.load_data(options)[0].to(torch.device(study.device))
        images, labels = data.train
        order = torch.Generator().manual_seed(derive_seed(study.options.seed, 0, "analyses"))
        found = batches(images, labels, min(BATCH, len(labels)), shuffle=order, drop_last=True)
        most = max(vars(self.effort).values())
        return [
            (data.normalize(x).to(memory_format=torch.channels_last), y)
            for (x, y), _ in zip(found, range(most), strict=False)
        ]

    def network(self, model: str, state: str) -> nn.Module:
        """`model` as its run starts, or with the weights of its best epoch."""
        key = model, state
        if key not in self._networks:
            options = self._options(model)
            if state == "trained":
                network = vgg.load_trained(options.out)
            else:
                torch.manual_seed(options.seed)
                network = vgg.build(options)[0]
            network = still(hyperfast.factored_(network, False))  # dense gradients, for any optimizer
            self._networks[key] = network.to(self.study.device, memory_format=torch.channels_last)
        return self._networks[key]


def still(network: nn.Module) -> nn.Module:
    """In training mode, but for dropout."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()
    return network


@dataclass(frozen=True)
class Analysis:
    """A table and a picture of what one function of `hyperfast.analysis` finds.

    about: what it is, a paragraph of the report. measure(network, subjects): what it finds, with `rows()` for
    the CSV; figures(result): the numbers of the report's table; draw(results): the picture. quantities: what
    batch norm is said to do. columns: figures that no quantity names, in words.
    """

    name: str
    title: str
    about: str
    measure: Callable[[nn.Module, Subjects], Any]
    figures: Callable[[Any], dict[str, float | None]]
    draw: Callable[[Results], Figure]
    quantities: tuple[Quantity, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def run(self, study: Study, part: str, subjects: Subjects) -> None:
        """Measure, write CSV, picture, and the figures last. Raises CheckpointError."""
        results: Results = {}
        start = time.perf_counter()
        for state, words in STATES.items():
            for model in study.options.models:
                print(f"{self.title.lower()}: {model}, {words}", flush=True)
                network = subjects.network(model, state)
                found = self.measure(network, subjects)
                results.setdefault(state, {})[model] = found
        (study.out / part).mkdir(exist_ok=True)
        rows = [
            {"model": model, "state": state} | row
            for state, by_model in results.items()
            for model, found in by_model.items()
            for row in found.rows()
        ]
        write_csv(study.path(part, self.name, "csv"), rows)
        save_figure(self.draw(results), study.path(part, self.name, "png"))
        values = {s: {m: self.figures(r) for m, r in own.items()} for s, own in results.items()}
        seconds = time.perf_counter() - start
        study.save(part, self.name, {"seconds": seconds, "values": values})

    def values(self, figures: Figures) -> Values:
        """For `Quantity`: its figures by state and model."""
        return figures["values"]

    def section(self, part: str, figures: Figures) -> str:
        """Of report.md, from what `run` saved."""
        values = figures["values"]
        shown = {q.key: q for q in self.quantities}
        words = {q.key: q.words for q in self.quantities} | dict(self.columns)
        header = ["network", "", *words.values()]
        rows = [
            [model, STATES[state], *(_text(shown.get(key), own[key]) for key in words)]
            for state, by_model in values.items()
            for model, own in by_model.items()
        ]
        picture = f"![{self.title}]({part}/{self.name}.png)"
        return "\n\n".join([self.about, table(header, rows), picture])


def _text(quantity: Quantity | None, value: float | None) -> str:
    if quantity:
        return quantity.text(value)
    return "-" if value is None else f"{value:.4g}"


@dataclass(frozen=True)
class Part:
    """Analyses that a command runs together."""

    name: str
    analyses: tuple[Analysis, ...]


# -- the analyses --------------------------------------------------------------------------------

BATCHES = {"batches": f"batches of {BATCH}"}


def _sgd(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=DECAY)


def _test_range(network: nn.Module, subjects: Subjects) -> analysis.LRRange:
    steps = subjects.effort.range_steps
    return analysis.lr_range_test(network, subjects.batches, _sgd, steps=steps, smoothing=AVERAGED / steps)


LR_FINDER = Analysis(
    "lr_finder",
    "Learning rates",
    "Learning rate range test (Smith, 2017): SGD with momentum 0.9 and weight decay 5e-4 whose learning rate "
    "grows geometrically with every step, one batch each, in training mode with dropout. Suggestion: the "
    "steepest descent of the smoothed loss.",
    _test_range,
    lambda found: {
        "suggestion": found.suggestion,
        "lowest": found.lowest,
        "diverged": found.diverged,
        "batches": found.batches,
    },
    pictures.lr_finder,
    columns={"suggestion": "suggestion", "lowest": "lowest loss at", "diverged": "diverged at"} | BATCHES,
)


def _train_at_rates(network: nn.Module, subjects: Subjects) -> analysis.LossLandscape:
    steps = subjects.effort.landscape_steps
    return analysis.loss_landscape(network, subjects.batches, optimizer=_sgd, steps=steps)


LANDSCAPE = Analysis(
    "landscape",
    "Loss landscape",
    "Trainings from one start on the same batches, SGD with momentum 0.9 and weight decay 5e-4, with the "
    "learning rates 0.001, 0.005, 0.01 and 0.05; the band goes from the lowest to the highest loss at each "
    "step (Santurkar et al., 2018), in training mode with dropout. The picture leaves a training out from "
    "where it diverged; the band then has no width.",
    _train_at_rates,
    lambda found: {"width": found.width, "diverged": len(found.diverged), "batches": found.batches},
    pictures.landscape,
    (Quantity("width", "mean width of the band", "narrower band of losses"),),
    {"diverged": "rates that diverged"} | BATCHES,
)


def _predict(network: nn.Module, subjects: Subjects) -> analysis.Predictiveness:
    return analysis.gradient_predictiveness(network, subjects.batches, limit=subjects.effort.batches)


PREDICTIVENESS = Analysis(
    "predictiveness",
    "Gradient predictiveness",
    "Norm of the change of a batch's gradient after a step of 0.1 along it, mean over batches; beside it the "
    "norm of the gradient and the ratio of the two.",
    _predict,
    lambda found: {
        "change": found.changes.mean().item(),
        "norm": found.norms.mean().item(),
        "ratio": found.ratios.mean().item(),
        "cosine": found.cosines.mean().item(),
        "batches": found.batches,
    },
    pictures.predictiveness,
    (Quantity("change", "norm of the change", "more predictive gradients"),),
    {"norm": "norm of the gradient", "ratio": "change / norm", "cosine": "cosine before and after"} | BATCHES,
)


def _differ(network: nn.Module, subjects: Subjects) -> analysis.MaxDifference:
    return analysis.max_gradient_difference(network, subjects.batches[0])


MAX_DIFFERENCE = Analysis(
    "max_difference",
    "Maximum gradient difference",
    "Largest absolute change of an element of the gradient on one batch, at 10 distances from 0 to 0.5 along "
    "the gradient, which is normalised for each parameter.",
    _differ,
    lambda found: {"average": found.average, "farthest": found.farthest, "batches": found.batches},
    pictures.max_difference,
    (
        Quantity(
            "average", "average over the distances", "smaller maximum difference",
            report=(0.2841, 0.0892), notebook=(0.2150, 0.0666),
        ),
        Quantity("farthest", "at 0.5", "smaller maximum difference", report=(0.78, 0.18)),
    ),
    BATCHES,
)  # fmt: skip


def _add_noise(network: nn.Module, subjects: Subjects) -> analysis.Smoothness:
    return analysis.gradient_smoothness(network, subjects.batches, limit=subjects.effort.batches)


SMOOTHNESS = Analysis(
    "smoothness",
    "Gradient smoothness",
    "Norm of the change of the gradient when noise of standard deviation 0.01 is added to the normalised "
    "images, over the mean norm of an image's noise, mean over batches: the lower, the smoother.",
    _add_noise,
    lambda found: {"average": found.average, "batches": found.batches},
    pictures.smoothness,
    (
        Quantity(
            "average", "change / noise", "smoother gradients",
            report=(2.8471, 1.2359), notebook=(0.9079, 0.9291),
        ),
    ),
    BATCHES,
)  # fmt: skip


def _count_gradients(network: nn.Module, subjects: Subjects) -> analysis.GradientHealth:
    return analysis.gradient_health(network, subjects.batches, limit=subjects.effort.batches)


HEALTH = Analysis(
    "health",
    "Gradient health",
    "Shares of the elements of all gradients that vanish, |g| < 1e-7, and explode, |g| > 1.",
    _count_gradients,
    lambda found: {
        "vanishing": 100 * found.vanishing_share,
        "exploding": 100 * found.exploding_share,
        "batches": found.batches,
    },
    pictures.health,
    (
        Quantity("vanishing", "vanishing", "fewer vanishing gradients", (15.2, 3.8), unit="%"),
        Quantity("exploding", "exploding", "fewer exploding gradients", (8.1, 1.2), unit="%"),
    ),
    BATCHES,
)


def _watch(network: nn.Module, subjects: Subjects) -> analysis.ActivationStatistics:
    limit = subjects.effort.activation_batches
    return analysis.activation_statistics(network, subjects.batches, limit=limit)


ACTIVATIONS = Analysis(
    "activations",
    "Activations",
    "Outputs of the activation functions. Dead: a channel or unit with |a| < 0.01 at every position of every "
    "image. Near zero: single activations with |a| < 0.01. The report gives one number, 45.2 % and 18.7 %; "
    "it stands beside both.",
    _watch,
    lambda found: {
        "dead": 100 * found.total.dead_share,
        "near_zero": 100 * found.total.values.near_zero,
        "mean": found.total.values.mean,
        "std": found.total.values.std,
        "batches": found.batches,
    },
    pictures.activations,
    (
        Quantity("dead", "dead", "fewer dead neurons", (45.2, 18.7), unit="%"),
        Quantity("near_zero", "near zero", "fewer dead neurons", (45.2, 18.7), unit="%"),
    ),
    {"mean": "mean", "std": "std"} | BATCHES,
)


def _weight_figures(found: analysis.WeightStatistics) -> dict[str, float | None]:
    """Of the weights of all convolutions and linear layers together."""
    own = [layer.values for layer in pictures.matrices(found)]
    count = sum(values.count for values in own)
    squares = sum(values.count * (values.std**2 + values.mean**2) for values in own)
    return {
        "rms": math.sqrt(squares / count),
        "largest": max(max(-values.min, values.max) for values in own),
        "near_zero": 100 * sum(values.count * values.near_zero for values in own) / count,
    }


WEIGHTS = Analysis(
    "weights",
    "Weights",
    "Distributions of the weights of convolutions and linear layers; of a hypernetwork those that it "
    "generates. The CSV has mean, deviation, extremes and quantiles of every parameter.",
    lambda network, subjects: analysis.weight_statistics(network),
    _weight_figures,
    pictures.weights,
    columns={"rms": "root mean square", "largest": "largest |w|", "near_zero": "|w| < 0.001, %"},
)
PARTS = (
    Part("lr_finder", (LR_FINDER,)),
    Part("landscape", (LANDSCAPE,)),
    Part("gradients", (PREDICTIVENESS, MAX_DIFFERENCE, SMOOTHNESS, HEALTH)),
    Part("activations", (ACTIVATIONS,)),
    Part("weights", (WEIGHTS,)),
)
