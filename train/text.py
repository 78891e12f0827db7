"""Text for character language models: vocabulary, parts, and streams of it as batches.

Two layouts are read: character-level Penn Treebank (`ptb.char.train.txt`, `ptb.char.valid.txt` and
`ptb.char.test.txt`: symbols of one character with blanks between them, `_` for a blank, a line's end a symbol
of its own) and any text file in UTF-8, whose last part is for validation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.data import DataError

PTB_PARTS = ("train", "valid", "test")
IGNORED = -100  # a target that is not to be predicted: ignore_index of torch.nn.functional.cross_entropy
NAMED = 5  # characters that a message names


class Vocabulary:
    """The characters that a model knows, all different; a character's token is its place among them."""

    def __init__(self, characters: Iterable[str]) -> None:
        """Raises ValueError for no character, one twice, and what is not one character."""
        self._characters = list(characters)
        if not self._characters or not all(isinstance(c, str) and len(c) == 1 for c in self._characters):
            raise ValueError(f"a vocabulary must be a list of characters, got {str(self._characters)[:100]}")
        if len(set(self._characters)) < len(self._characters):
            raise ValueError("a vocabulary must not have a character twice")
        self._codes = _codes("".join(self._characters))
        self._tokens = np.full(int(self._codes.max()) + 2, -1, np.int32)  # by code, the last for all above
        self._tokens[self._codes] = np.arange(len(self), dtype=np.int32)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The characters of `text`, by code point. Raises ValueError for an empty text."""
        return cls(sorted(set(text)))

    def __len__(self) -> int:
        return len(self._characters)

    def __contains__(self, character: str) -> bool:
        return character in self._characters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._characters == other._characters

    def __hash__(self) -> int:
        return hash(tuple(self._characters))

    def __repr__(self) -> str:
        return f"Vocabulary({''.join(self._characters)!r})"

    def to_list(self) -> list[str]:
        """The characters in order, for a checkpoint; `Vocabulary(...)` of it gives the same one."""
        return list(self._characters)

    @property
    def dtype(self) -> torch.dtype:
        """Of tokens: uint8 where it holds them, otherwise int32."""
        return torch.uint8 if len(self) <= 256 else torch.int32

    def encode(self, text: str, where: str = "the text", start: int = 0) -> Tensor:
        """Tokens [len(text)] of `dtype`.

        Raises DataError for characters that the vocabulary does not have; it says which (the first few),
        where they first are and how many. where: what the message calls the text; start: the position in it
        of text[0].
        """
        codes = _codes(text)
        tokens = self._tokens[np.minimum(codes, len(self._tokens) - 1)]
        unseen = np.flatnonzero(tokens < 0)
        if len(unseen):
            kinds, first = np.unique(codes[unseen], return_index=True)
            order = first.argsort()
            positions = unseen[first[order]] + start
            named = [f"{chr(c)!r} (position {i:,})" for c, i in zip(kinds[order], positions, strict=True)]
            more = ", ..." if len(named) > NAMED else ""
            raise DataError(
                f"{where}: {len(unseen):,} of {len(text):,} characters are not among the {len(self)} of the "
                f"vocabulary, those of the training text: {', '.join(named[:NAMED])}{more}"
            )
        return torch.from_numpy(tokens).to(self.dtype)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens [T], of any integer dtype. Raises ValueError for one not in 0..len - 1."""
        places = torch.as_tensor(tokens).cpu().numpy().astype(np.int64)
        wrong = (places < 0) | (places >= len(self))
        if wrong.any():
            raise ValueError(f"tokens must be in 0..{len(self) - 1}, got {places[wrong][0]}")
        return self._codes[places].tobytes().decode("utf-32-le", "surrogatepass")


def _codes(text: str) -> np.ndarray:
    """Code points, uint32 [len(text)]; also of what is not valid UTF-8 in a command line."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


# ---- reading ----


@dataclass(frozen=True)
class Text:
    """Tokens of the parts of a text, each [number of characters], of `vocabulary.dtype`, on the CPU.

    name: "ptb" or the file's name. test: None where the data has no part for it.
    """

    name: str
    vocabulary: Vocabulary
    train: Tensor
    validation: Tensor
    test: Tensor | None


def load_text(path: str | Path | None, val_split: float = 0.1, vocabulary: Vocabulary | None = None) -> Text:
    """The text at `path`, otherwise at HYPERFAST_DATA, as tokens.

    path: a text file in UTF-8 (line ends become "\\n"), of which the last share val_split is for validation;
    or a folder, in which Penn Treebank's three files are looked for (there, in text/ptb, ptb and text), then
    the only text file `*.txt`. Penn Treebank has its own parts; its `_` becomes a blank.

    vocabulary: of a model that was trained; by default that of the training part, since what a model is
    measured on tells it nothing: a character that only the other parts have is an error, as in any other text
    for the model. Raises ValueError for a val_split outside (0, 1), DataError for every fault of the data,
    characters that the vocabulary does not have among them.
    """
    if not 0 < val_split < 1:
        raise ValueError(f"val_split must be above 0 and below 1, got {val_split}")
    path = path or os.environ.get("HYPERFAST_DATA")
    if not path:
        raise DataError(
            "no text was given. Choose one: --data-path PATH, or the environment variable "
            "HYPERFAST_DATA=PATH, where PATH is a text file, or a folder that holds ptb.char.train.txt, "
            "ptb.char.valid.txt and ptb.char.test.txt (or text/ptb/ with them)"
        )
    found = _find(Path(path).expanduser())
    return _read_ptb(found, vocabulary) if found.is_dir() else _read_file(found, val_split, vocabulary)


def _find(path: Path) -> Path:
    """The text file, or the folder of Penn Treebank, that `path` is or contains."""
    if path.is_file():
        if path.name in [_ptb_file(path, part).name for part in PTB_PARTS]:
            raise DataError(f"{path} is a part of Penn Treebank: give its folder, {path.parent}")
        return path
    if not path.is_dir():
        raise DataError(f"{path} does not exist")
    folders = [path, *(path / name for name in ("text/ptb", "ptb", "text"))]
    for folder in folders:
        if any(_ptb_file(folder, part).is_file() for part in PTB_PARTS):
            return folder
    for folder in (path, path / "text"):
        files = sorted(folder.glob("*.txt"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{folder} has several text files, name the one that is meant: {names}")
        if files:
            return files[0]
    places = ", ".join(map(str, folders))
    raise DataError(f"no text under {path}: looked for ptb.char.*.txt and one *.txt in {places}")


def _ptb_file(folder: Path, part: str) -> Path:
    return folder / f"ptb.char.{part}.txt"


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start:,}") from error
    if not text:
        raise DataError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_file(path: Path, val_split: float, vocabulary: Vocabulary | None) -> Text:
    text = _read(path)
    start = len(text) - int(len(text) * val_split)
    for part, size in (("training", start), ("validation", len(text) - start)):
        if size < 2:
            raise DataError(
                f"{path} has {len(text):,} characters; with val_split {val_split:g} its {part} part has "
                f"{size}, fewer than the 2 of which one can be predicted"
            )
    own = vocabulary or Vocabulary.of(text[:start])
    train = own.encode(text[:start], str(path))
    try:
        validation = own.encode(text[start:], str(path), start)
    except DataError as error:
        remedy = "" if vocabulary else ": choose another --val-split, or remove them"
        raise DataError(f"{error}{remedy}") from error
    return Text(path.name, own, train, validation, None)


def _read_ptb(folder: Path, vocabulary: Vocabulary | None) -> Text:
    files = [_ptb_file(folder, part) for part in PTB_PARTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"missing in {folder}: {', '.join(missing)}")
    texts = [_read_symbols(file) for file in files]
    vocabulary = vocabulary or Vocabulary.of(texts[0])
    train, validation, test = (
        vocabulary.encode(text, str(file)) for text, file in zip(texts, files, strict=True)
    )
    return Text("ptb", vocabulary, train, validation, test)


def _read_symbols(path: Path) -> str:
    """The symbols in a file of Penn Treebank."""
    text = _read(path)
    codes = _codes(text)
    symbols = (codes != ord(" ")) & (codes != ord("\n"))
    longer = np.flatnonzero(symbols[1:] & symbols[:-1])
    if len(longer):
        around = text[longer[0] : longer[0] + 20]
        raise DataError(
            f"{path} is not the character-level Penn Treebank, of symbols of one character with a blank "
            f"after each: position {longer[0]:,} has {around!r}. A text file of another name is read as it is"
        )
    text = text.replace(" ", "").replace("_", " ")
    if len(text) < 2:
        raise DataError(f"{path} has {len(text)} symbols, fewer than the 2 of which one can be predicted")
    return text


# ---- batches ----


@dataclass(frozen=True)
class Streams:
    """B passages of a text, side by side: iterating gives (x [B, T], y [B, T]) int64, y the characters that
    follow those of x.

    Row b of a batch goes on where row b of the batch before ended, so that a model's state can be carried
    from batch to batch (truncated backpropagation through time); before the first it is zero. A target that
    is not to be predicted is IGNORED. Iterate as often as wanted.

    inputs, outputs: [B, S], all characters of the passages and those after them. length: T. targets: how many
    are to be predicted, unused: how many of the text never are.
    """

    inputs: Tensor
    outputs: Tensor
    length: int
    targets: int
    unused: int

    def __len__(self) -> int:
        """Batches; the last may have fewer than T steps."""
        return -(-self.inputs.shape[1] // self.length)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        T = self.length
        pairs = zip(self.inputs.split(T, dim=1), self.outputs.split(T, dim=1), strict=True)
        return ((x.long(), y.long()) for x, y in pairs)


def streams(tokens: Tensor, batch: int, length: int, offset: int = 0) -> Streams:
    """Tokens [N] for training: B = batch passages of equal length, every batch [B, T], T = length.

    Every character from the second on is a target once, but for the `unused`, fewer than B T, that do not
    fill a batch: there are floor((N - 1 - offset) / (B T)). They are the last ones of the text; offset, 0 to
    unused, leaves that many out at its beginning instead: with another one each epoch all serve in turn.

    Raises DataError for a text that does not fill one batch, ValueError for other wrong arguments.
    """
    _check(tokens, batch, length)
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    steps = (len(tokens) - 1 - offset) // (batch * length) * length
    if steps < 1:
        raise DataError(
            f"the training text has {max(len(tokens) - offset, 0):,} characters; a batch of {batch} passages "
            f"of {length} needs {batch * length + 1:,}: choose a smaller batch size or sequence length"
        )
    n = batch * steps
    inputs, outputs = (tokens[start : start + n].view(batch, steps) for start in (offset, offset + 1))
    return Streams(inputs, outputs, length, n, len(tokens) - 1 - n)


def evaluation_streams(tokens: Tensor, batch: int, length: int, warmup: int | None = None) -> Streams:
    """Tokens [N] for evaluation: every character from the second on is a target once, whatever B and T.

    At most batch passages; each but the first begins `warmup` (T) characters before its first target, so that
    a model's state, zero there, has read something as it starts to count: the figures then hardly depend on
    the batch size. S = ceil((N - 1 + (B - 1) warmup) / B) steps in batches of T, the last one shorter. The
    last passage ends with the text, and what it has in common with the one before is IGNORED in it, as every
    warm-up is. Divide the sum of the losses by `targets`, N - 1.

    Raises DataError for fewer than 2 characters, ValueError for other wrong arguments.
    """
    _check(tokens, batch, length)
    warmup = length if warmup is None else warmup
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    targets = len(tokens) - 1
    if targets < 1:
        raise DataError(f"a text to evaluate must have 2 characters at least, got {len(tokens)}")
    steps = min(-(-(targets + (batch - 1) * warmup) // batch), targets)
    starts, ends = [0], [steps]  # of the passages among the targets
    while ends[-1] < targets:
        starts.append(min(ends[-1] - warmup, targets - steps))
        ends.append(starts[-1] + steps)
    passages = torch.stack([tokens[start : start + steps + 1] for start in starts])
    outputs = passages[:, 1:].to(torch.int64, copy=True)
    for row, start, done in zip(outputs[1:], starts[1:], ends, strict=False):
        row[: done - start] = IGNORED
    return Streams(passages[:, :-1], outputs, length, targets, 0)


def _check(tokens: Tensor, batch: int, length: int) -> None:
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be [N], got {list(tokens.shape)}")
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
