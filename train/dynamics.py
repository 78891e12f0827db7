"""Where in a text a HyperLSTM changes the weights of its main LSTM: figures by kind of character, and the
text itself, each character coloured by the change as the model reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor, nn

from hyperfast.analysis import table, weight_changes
from hyperfast.analysis.pictures import style
from hyperfast.nn import HyperLSTM
from hyperfast.reference import LSTMState
from train.generate_text import evaluation_mode
from train.text import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

GATES = ("i", "f", "g", "o")
SETTLED = 100  # characters after which a state that began at zero is taken as any other
LISTED = 12  # single characters in the table
SEEN, SHARE = 10, 1e-3  # how often, and of how much of the text, they are there at least
COLUMNS = 72  # of a picture
CELL = 1.0, 0.22, 0.35  # heights in a picture: of a character, of the strip of a gate, of the space below
FONT = FontProperties(family="DejaVu Sans Mono")  # matplotlib brings it
SIGNS = {"\n": "\u21b5", "\t": "\u2192"}
MISSING = "\u25a1"

# The first that fits a character, by the one before it, is its kind.
KINDS: dict[str, Callable[[str, str], bool]] = {
    "end of a line": lambda before, c: c == "\n",
    "blank": lambda before, c: c.isspace(),
    "capital letter": lambda before, c: c.isupper(),
    "first letter of a word": lambda before, c: c.isalpha() and not (before.isalnum() or before == "'"),
    "letter in a word": lambda before, c: c.isalpha(),
    "digit": lambda before, c: c.isdigit(),
    "punctuation": lambda before, c: True,
}


@dataclass(frozen=True)
class Group:
    """Characters of one kind, or all that are the same. changes [4]: means for the gates i, f, g, o; total:
    mean of the change of all weights."""

    name: str
    count: int
    changes: tuple[float, ...]
    total: float


@dataclass(frozen=True)
class Dynamics:
    """texts: B passages of S characters. changes: of the weights as a character is read, against those of the
    character before, float64 [layers, B, S, 3, 4] as in `hyperfast.analysis.weight_changes`; NaN at the first
    of a passage."""

    texts: tuple[str, ...]
    changes: Tensor

    @property
    def gates(self) -> Tensor:
        """[layers, B, S, 4]: the norm over the three places, x, h and bias."""
        return self.changes.norm(dim=-2)

    def by_kind(self, layer: int = 0) -> list[Group]:
        """The kinds of characters that occur, the one with the largest changes first."""
        return self._groups(layer, kind)

    def by_character(self, layer: int = 0) -> list[Group]:
        """The same for every character."""
        return self._groups(layer, lambda before, c: c)

    def _groups(self, layer: int, name: Callable[[str, str], str]) -> list[Group]:
        """Settled characters, in groups by `name` of the character before and the character."""
        begin = _settled(len(self.texts[0]))
        gates = self.gates[layer, :, begin:].flatten(0, 1)  # [B (S - begin), 4]
        pairs = (pair for text in self.texts for pair in zip(text[begin - 1 :], text[begin:], strict=False))
        names = [name(before, c) for before, c in pairs]
        found = {each: i for i, each in enumerate(dict.fromkeys(names))}
        member = torch.tensor([found[each] for each in names])
        figures = torch.cat([gates, gates.norm(dim=1, keepdim=True)], 1)
        counts = member.bincount()
        means = torch.zeros(len(found), 5, dtype=figures.dtype).index_add_(0, member, figures)
        means /= counts[:, None]
        groups = [
            Group(each, n, tuple(row[:4]), row[4])
            for each, n, row in zip(found, counts.tolist(), means.tolist(), strict=True)
        ]
        return sorted(groups, key=lambda group: -group.total)

    def to_markdown(self) -> str:
        """For each layer a table of the kinds and one of single characters, of those that occur SEEN times
        and make up the SHARE of the text, since the mean over a few says little."""
        parts = []
        for layer in range(len(self.changes)):
            kinds, characters = self.by_kind(layer), self.by_character(layer)
            n = sum(group.count for group in kinds)
            mean = sum(group.count * group.total for group in kinds) / n
            often = [group for group in characters if group.count >= max(SEEN, SHARE * n)]
            title = f" of layer {layer + 1}" if len(self.changes) > 1 else ""
            parts.append(
                f"Change of the weights{title} as a character is read, against those for the character "
                f"before: Frobenius norm, mean over {n:,} characters {mean:.3g}.\n\n"
                f"{_table('kind', kinds, mean)}"
            )
            shown = [Group(repr(group.name), *list(vars(group).values())[1:]) for group in often[:LISTED]]
            if shown:
                parts.append(_table("character", shown, mean))
        return "\n\n".join(parts)

    def figure(self, length: int = 600, layer: int = 0, columns: int = COLUMNS) -> Figure:
        """`length` characters of the first passage, from a line's beginning on: the background of each is the
        change of all weights of the layer, the strips below it those of the gates i, f, g and o."""
        begin = _settled(len(self.texts[0]))
        line = re.compile(r"\n+(?=.)").search(self.texts[0], begin, 3 * begin)
        begin = line.end() if line else begin
        text, gates = self.texts[0][begin : begin + length], self.gates[layer, 0, begin : begin + length]
        title = f"layer {layer + 1}: " if len(self.changes) > 1 else ""
        return text_figure(text, gates, columns, title)


def kind(before: str, c: str) -> str:
    """Of the character c after another: one of KINDS."""
    return next(name for name, fits in KINDS.items() if fits(before, c))


def _settled(length: int) -> int:
    """Where in passages of this length figures begin."""
    return max(1, min(SETTLED, length // 2))


def _table(what: str, groups: list[Group], mean: float) -> str:
    def cells(group: Group) -> list[str]:
        of_mean = f"{group.total / mean:.2f}" if mean else ""
        gates = [f"{change:.3g}" for change in group.changes]
        return [group.name, f"{group.count:,}", f"{group.total:.3g}", of_mean, *gates]

    header = [what, "number", "change", "of the mean", *(f"gate {gate}" for gate in GATES)]
    return table(header, [cells(group) for group in groups])


@torch.no_grad()
def text_dynamics(
    model: nn.Module, vocabulary: Vocabulary, tokens: Tensor, passages: int = 16, length: int = 1000
) -> Dynamics:
    """How the weights of a HyperLSTM change over the beginning of a text, tokens [N].

    model: contains one `hyperfast.nn.HyperLSTM` and maps (tokens [B, T] int64, state or None) to (logits,
    state), the state that of the HyperLSTM, in its order. At most `passages` of `length` characters are read
    side by side, one character at a time, each passage from a state of zeros. Raises ValueError for a model
    without a HyperLSTM or with several, and for fewer than two characters.
    """
    found = [module for module in model.modules() if isinstance(module, HyperLSTM)]
    if len(found) != 1:
        raise ValueError(f"model must have one HyperLSTM, of which weights change; it has {len(found)}")
    S = min(length, len(tokens))
    if S < 2 or passages < 1:
        raise ValueError(
            f"changes need 1 passage of 2 characters at least, got {passages} of {S} (text: {len(tokens)})"
        )
    B = min(passages, len(tokens) // S)
    tokens = tokens[: B * S].view(B, S)
    x = tokens.long().to(next(model.parameters()).device)
    outputs, state = [], None
    with evaluation_mode(model):
        for t in range(S):
            _, state = model(x[:, t : t + 1], state)
            outputs.append(LSTMState(*state).hyper_h)
    hyper_h = torch.stack(outputs, 2)  # [layers, B, S, M]
    changes = torch.stack([weight_changes(*own) for own in zip(found[0].layers, hyper_h, strict=True)])
    before = changes.new_full((*changes.shape[:2], 1, 3, 4), math.nan)
    return Dynamics(tuple(map(vocabulary.decode, tokens)), torch.cat([before, changes], 2).cpu())


# ---- picture ----


def text_figure(text: str, gates: Tensor, columns: int = COLUMNS, title: str = "") -> Figure:
    """Text, each character on a background coloured by the norm of gates [T, 4], the gates in strips below.

    All have one scale, which ends at the 99th percentile of the backgrounds; NaN stays white. A line ends at
    a line's end, shown as a sign, empty lines with the one before, or after `columns` characters. Raises
    ValueError for an empty text and gates of another length.
    """
    if not text or gates.shape != (len(text), 4):
        raise ValueError(
            f"gates must be [{len(text)}, 4] for a text that is not empty, got {list(gates.shape)}"
        )
    lines = list(_lines(text, columns))
    width = max(len(places) for places in lines)
    total = gates.norm(dim=1)
    largest = total[~total.isnan()].quantile(0.99).item() if not total.isnan().all() else 0.0
    height = sum(CELL) + 3 * CELL[1]
    with style() as Figure:
        size = (max(0.105 * width, 3.0) + 1.1, 0.19 * height * len(lines) + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        axis.set(xlim=(0, width), ylim=(height * len(lines), 0))
        axis.set_axis_off()
        for row, places in enumerate(lines):
            own = gates[places.start : places.stop]
            image = _cells(axis, row * height, own, total[places.start : places.stop], largest or 1.0)
            for column, place in enumerate(places):
                value = total[place].item()
                axis.text(
                    column + 0.5, row * height + 0.5, _shown(text[place]), ha="center", va="center_baseline",
                    color="white" if value > 0.65 * largest > 0 else "black", fontsize=8,
                    fontproperties=FONT, in_layout=False,
                )  # fmt: skip
        figure.colorbar(image, ax=axis, extend="max", shrink=min(1.0, 2.0 / size[1]), aspect=15,
                        label="change of the weights")  # fmt: skip
        axis.set_title(f"{title}background: all weights; strips: gates {', '.join(GATES)}", fontsize=8)
    return figure


def _lines(text: str, columns: int) -> Iterator[range]:
    """Where the lines of the picture begin and end in the text."""
    start = 0
    for i, c in enumerate(text, 1):
        if (c == "\n" and text[i : i + 1] != "\n") or i - start == columns or i == len(text):
            yield range(start, i)
            start = i


def _cells(axis: Axes, top: float, gates: Tensor, total: Tensor, largest: float) -> QuadMesh:
    """The colours of one line; `top`: its upper edge."""
    edges = [top, top + CELL[0], *(top + CELL[0] + CELL[1] * (i + 1) for i in range(4))]
    values = torch.cat([total[None], gates.T]).numpy()
    return axis.pcolormesh(range(len(total) + 1), edges, values, cmap="YlOrRd", vmin=0, vmax=largest)


def _shown(character: str) -> str:
    """What stands for a character: a sign for a line's end, a tab and what the font does not have."""
    sign = SIGNS.get(character, character)
    if sign.isspace():
        return ""
    return sign if get_font(findfont(FONT)).get_char_index(ord(sign)) else MISSING
