"""train/dynamics.py with a small HyperLSTM and with figures made by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from hyperfast.analysis import weight_changes
from hyperfast.nn import LSTM, HyperLSTM
from train.dynamics import Dynamics, Group, kind, text_dynamics, text_figure
from train.text import Vocabulary

ABC = Vocabulary.of("abc\n ")


class Model(nn.Module):
    def __init__(self, layers=1, rnn=HyperLSTM):
        super().__init__()
        torch.manual_seed(0)
        options = {"hyper_size": 5, "embedding_size": 2} if rnn is HyperLSTM else {}
        self.embedding = nn.Embedding(5, 4)
        self.rnn = rnn(4, 6, layers, batch_first=True, backend="reference", recurrent_dropout=0.5, **options)
        self.output = nn.Linear(6, 5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, tokens, state=None):
        assert tokens.dtype == torch.int64
        output, state = self.rnn(self.embedding(tokens), state)
        return self.output(output), state


class TestChanges:
    @pytest.mark.parametrize("layers", [1, 2])
    def test_those_between_the_steps_of_the_model(self, layers):
        model, text = Model(layers), "ab\nca ba cc\nab"
        dynamics = text_dynamics(model, ABC, ABC.encode(text), passages=3, length=4)
        assert dynamics.texts == ("ab\nc", "a ba", " cc\n") and model.training
        assert dynamics.changes.shape == (layers, 3, 4, 3, 4)
        assert dynamics.changes[:, :, 0].isnan().all() and not dynamics.changes[:, :, 1:].isnan().any()
        model.eval()
        tokens = ABC.encode(text).long()[4:8]  # the second passage alone
        ends = [model(tokens[None, :n])[1].hyper_h[:, 0] for n in range(1, 5)]
        for layer, cell in enumerate(model.rnn.layers):
            wanted = weight_changes(cell, torch.stack([end[layer] for end in ends]))
            assert torch.allclose(dynamics.changes[layer, 1, 1:], wanted, rtol=1e-4) and wanted.all()
        gates = (dynamics.changes**2).sum(3).sqrt()
        torch.testing.assert_close(dynamics.gates, gates, equal_nan=True)

    def test_a_short_text_is_one_passage(self):
        dynamics = text_dynamics(Model(), ABC, ABC.encode("ab"))
        assert dynamics.texts == ("ab",) and dynamics.changes.shape == (1, 1, 2, 3, 4)
        assert [group.count for group in dynamics.by_kind()] == [1]

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="one HyperLSTM.* it has 0"):
            text_dynamics(Model(rnn=LSTM), ABC, ABC.encode("abc"))
        with pytest.raises(ValueError, match="one HyperLSTM.* it has 2"):
            text_dynamics(nn.ModuleList([Model(), Model()]), ABC, ABC.encode("abc"))
        for arguments in (("a",), ("abc", 0), ("abc", 1, 1)):
            with pytest.raises(ValueError, match="2 characters at least"):
                text_dynamics(Model(), ABC, ABC.encode(arguments[0]), *arguments[1:])


@pytest.mark.parametrize(
    "before, c, name",
    [
        ("a", "\n", "end of a line"),
        ("a", " ", "blank"),
        ("a", "\t", "blank"),
        (" ", "A", "capital letter"),
        ("A", "B", "capital letter"),
        (" ", "É", "capital letter"),
        ("\n", "a", "first letter of a word"),
        ("-", "a", "first letter of a word"),
        ("A", "a", "letter in a word"),
        ("'", "t", "letter in a word"),
        ("3", "d", "letter in a word"),
        ("é", "日", "letter in a word"),
        ("a", "3", "digit"),
        ("a", "'", "punctuation"),
        (" ", "<", "punctuation"),
    ],
)
def test_kind(before, c, name):
    assert kind(before, c) == name


def by_hand(texts, values):
    """Dynamics of one layer with these changes of gate i at h, twice them at gate o at x."""
    changes = torch.zeros(1, len(texts), len(texts[0]), 3, 4, dtype=torch.float64)
    changes[0, :, :, 1, 0] = torch.tensor(values, dtype=torch.float64)
    changes[0, :, :, 0, 3] = 2 * changes[0, :, :, 1, 0]
    return Dynamics(tuple(texts), changes)


class TestGroups:
    # three settle: figures begin at the fourth character
    DYNAMICS = by_hand(["abc ab", "ab\n a\n"], [[math.nan, 9, 9, 1, 2, 4], [math.nan, 9, 9, 3, 8, 16]])

    def test_means_of_kinds(self):
        groups = self.DYNAMICS.by_kind()
        root = math.sqrt(5)
        wanted = [
            Group("end of a line", 1, (16, 0, 0, 32), 16 * root),
            Group("first letter of a word", 2, (5, 0, 0, 10), 5 * root),
            Group("letter in a word", 1, (4, 0, 0, 8), 4 * root),
            Group("blank", 2, (2, 0, 0, 4), 2 * root),
        ]
        for group, other in zip(groups, wanted, strict=True):
            assert (group.name, group.count) == (other.name, other.count)
            assert (*group.changes, group.total) == pytest.approx((*other.changes, other.total))

    def test_means_of_characters(self):
        found = [(group.name, group.count, group.changes[0]) for group in self.DYNAMICS.by_character()]
        assert found == [("\n", 1, 16), ("a", 2, 5), ("b", 1, 4), (" ", 2, 2)]

    def test_markdown(self):
        text = self.DYNAMICS.to_markdown()
        assert "| kind | number |" in text and "| character |" not in text  # none is there ten times
        mean = (16 + 10 + 4 + 4) * math.sqrt(5) / 6
        assert f"mean over 6 characters {mean:.3g}." in text
        assert (
            f"| end of a line | 1 | {16 * math.sqrt(5):.3g} | {16 * 6 / 34:.2f} | 16 | 0 | 0 | 32 |" in text
        )
        assert "layer" not in text

    @pytest.mark.parametrize("n, rare, often", [(3000, 9, 10), (20000, 20, 21)])
    def test_markdown_leaves_out_what_is_rare(self, n, rare, often):
        """Of 20,041 characters 21 are 0.1 %; of fewer than 10,000 ten is the least."""
        text = "b" * rare + "\n" * often + "a" * n
        dynamics = by_hand(["a" * 100 + text], [[1.0] * (100 + len(text))])
        found = dynamics.to_markdown()
        assert f"| '\\n' | {often} |" in found and f"| 'a' | {n:,} |" in found and "'b'" not in found

    def test_markdown_without_any_change_and_of_two_layers(self):
        dynamics = by_hand(["abcab"], [[0.0] * 5])
        assert "| letter in a word | 3 | 0 |  | 0 | 0 | 0 | 0 |" in dynamics.to_markdown()
        both = Dynamics(dynamics.texts, torch.cat([dynamics.changes, dynamics.changes + 1])).to_markdown()
        assert "weights of layer 1 as" in both and "weights of layer 2 as" in both
        assert f"| 3 | {math.sqrt(12):.3g} | 1.00 | {math.sqrt(3):.3g} |" in both


def drawn(figure):
    """The signs in their places, and the colours of the lines: [5, length] each."""
    axis = figure.axes[0]
    signs = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    return signs, [np.ma.filled(mesh.get_array(), np.nan) for mesh in axis.collections], axis


class TestFigure:
    def test_lines_and_colours(self):
        text, gates = "ab\ncdefg", torch.rand(8, 4, dtype=torch.float64)
        gates[0] = math.nan
        signs, lines, axis = drawn(text_figure(text, gates, columns=4, title="layer 2: "))
        height = axis.get_ylim()[0] / 3
        rows = [[signs[i + 0.5, row * height + 0.5] for i in range(n)] for row, n in enumerate((3, 4, 1))]
        assert rows == [["a", "b", "\u21b5"], list("cdef"), ["g"]]
        for line, own in zip(lines, gates.split([3, 4, 1]), strict=True):
            np.testing.assert_allclose(line, torch.cat([own.norm(dim=1)[None], own.T]))
        limit = np.quantile(gates[1:].norm(dim=1), 0.99)
        for mesh in axis.collections:
            assert mesh.get_clim() == (0, pytest.approx(limit))
        assert axis.get_title() == "layer 2: background: all weights; strips: gates i, f, g, o"

    def test_empty_lines_stand_with_the_line_before(self):
        _, lines, _ = drawn(text_figure("ab\n\n\nc\n", torch.rand(7, 4), columns=4))
        assert [line.shape[1] for line in lines] == [4, 1, 2]

    def test_text_is_black_on_light_and_white_on_dark(self):
        gates = torch.tensor([0.0, 0.5, 1.0, math.nan])[:, None].expand(4, 4)
        axis = text_figure("abcd", gates).axes[0]
        assert [text.get_color() for text in axis.texts] == ["black", "black", "white", "black"]

    def test_characters_of_every_kind(self, tmp_path):
        text = "$x^2$_ \t\r\x00\x1b\x7f\u200b\u65e5\U0001f642\u00e9\u0301\ue000\udcff\n"
        figure = text_figure(text, torch.rand(len(text), 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.savefig(tmp_path / "a.png", dpi=50)
        signs = "".join(text.get_text() or " " for text in figure.axes[0].texts)
        assert signs.startswith("$x^2$_ \u2192 ") and signs.endswith("\u25a1\u25a1\u21b5")
        assert "\u25a1" * 3 in signs and "\u00e9" in signs and "\u65e5" not in signs

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_no_change_at_all(self, value, tmp_path):
        text_figure("ab", torch.full((2, 4), value)).savefig(tmp_path / "a.png", dpi=50)

    def test_wrong_arguments(self):
        for text, gates in (("", torch.zeros(0, 4)), ("ab", torch.zeros(3, 4)), ("ab", torch.zeros(2, 3))):
            with pytest.raises(ValueError, match=rf"gates must be \[{len(text)}, 4\]"):
                text_figure(text, gates)

    def test_begins_at_a_line_after_the_model_has_settled(self):
        text = "x" * 149 + "\n\nfirst\n" + "y" * 60
        dynamics = by_hand([text], [[float(i) for i in range(len(text))]])
        figure = dynamics.figure(length=9, columns=5)
        signs, lines, _ = drawn(figure)
        assert "".join(signs.values()) == "first\u21b5yyy"
        assert lines[0][1].tolist() == [151, 152, 153, 154, 155] and lines[0][4, 0] == 302
        without = by_hand(["x" * 220], [[1.0] * 220])
        assert (
            len(without.figure().axes[0].texts) == 120
            and not without.figure().axes[0].get_title()[:5] == "layer"
        )
        both = Dynamics(dynamics.texts, torch.cat([dynamics.changes, 2 * dynamics.changes]))
        signs, lines, axis = drawn(both.figure(length=2, layer=1))
        assert axis.get_title().startswith("layer 2: ") and lines[0][1].tolist() == [302, 304]
