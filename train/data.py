"""Image data sets, decoded once to uint8 tensors in memory.

Two layouts are read: torchvision's (`cifar-100-python/` or its tar.gz, `MNIST/raw/`; checked against the
official md5 sums) and the Hugging Face hub's Parquet (`train-*.parquet`, `test-*.parquet`). Without a folder,
torchvision downloads.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")  # naming them spares PIL half its time
ROWS_AT_ONCE = 2000


class DataError(ValueError):
    """Data that is missing, damaged or not what it should be; the message names the file or folder."""


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set must look like. label: column in Parquet; hub_folder: its folder in the hub layout;
    unpacked: md5 sums of idx files by name."""

    name: str
    torchvision_class: type[datasets.CIFAR10] | type[datasets.MNIST]
    label: str
    num_classes: int
    train_rows: int
    test_rows: int
    hub_folder: str
    image_columns: tuple[str, ...] = ("img", "image")
    image_shape: tuple[int, int, int] = (3, 32, 32)
    unpacked: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Of torchvision's layout."""
        return "MNIST/raw" if self.is_idx else self.torchvision_class.base_folder

    @property
    def archive(self) -> str | None:
        """That folder as one file, where there is such a one."""
        return None if self.is_idx else self.torchvision_class.filename

    @property
    def is_idx(self) -> bool:
        """Whether torchvision keeps idx files, packed or not; otherwise pickles."""
        return issubclass(self.torchvision_class, datasets.MNIST)


# torchvision gives the sums of the packed files alone
IDX_SUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CIFAR10 = DatasetSpec("cifar10", datasets.CIFAR10, "label", 10, 50_000, 10_000, "plain_text")
CIFAR100 = DatasetSpec("cifar100", datasets.CIFAR100, "fine_label", 100, 50_000, 10_000, "cifar100")
MNIST = DatasetSpec(
    "mnist", datasets.MNIST, "label", 10, 60_000, 10_000, "mnist", image_shape=(1, 28, 28), unpacked=IDX_SUMS
)
DATASETS = {spec.name: spec for spec in (CIFAR10, CIFAR100, MNIST)}


@dataclass
class ImageSet:
    """Images uint8 [N, C, H, W], labels int64 [N], class names by label."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]


def load_images(name: str, root: str | Path | None = None, part: tuple[int, int] | None = None) -> ImageSet:
    """Load "cifar10", "cifar100" or "mnist" from the folder root, else from HYPERFAST_DATA, else by
    downloading.

    part: (n, seed) for `subset(data, n, seed)`; of the hub's layout those images alone are decoded. Raises
    ValueError for an unknown name, DataError for every fault of the data.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return load(DATASETS[name], root, part)


def load(spec: DatasetSpec, root: str | Path | None = None, part: tuple[int, int] | None = None) -> ImageSet:
    """Load the data set that spec describes as `load_images` does. Only without a folder is it downloaded."""
    root = root or os.environ.get("HYPERFAST_DATA")
    if not root:
        data = _load_cached(spec)
    else:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise DataError(f"the data folder {root} does not exist or is not a folder")
        data = _find(spec, root, part)
    if data is None:
        places = ", ".join(str(folder) for folder in _folders(spec, root))
        raise DataError(f"no {spec.name} data under {root}: looked for {_wanted(spec)} in {places}")
    return data if part is None else subset(data, *part)


def split(n: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded random split of n samples: indices int64 [n - validation] and [validation]."""
    if not 0 <= validation < n:
        raise ValueError(f"validation must be between 0 and {n - 1} samples, got {validation}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]


def subset(data: ImageSet, n: int, seed: int) -> ImageSet:
    """The first n training images of a seeded shuffle, and the first n test images, or all of fewer. Raises
    DataError for more than there are training images."""
    order = _order(len(data.train_labels), n, seed)
    train = data.train_images[order], data.train_labels[order]
    return ImageSet(*train, data.test_images[:n], data.test_labels[:n], data.classes)


def _order(total: int, n: int, seed: int) -> Tensor:
    """The first n of a seeded shuffle of `total` indices. Raises DataError for more than there are."""
    if n > total:
        raise DataError(f"a subset of {n} images, but there are {total} for training")
    return split(total, 0, seed)[0][:n]


def batches(
    images: Tensor, labels: Tensor, batch_size: int, *, shuffle: torch.Generator | None, drop_last: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over (images [B, ...], labels [B]); the last batch may be smaller, or is dropped.

    With a generator the order is drawn from it, in this call, not later; with None batches are views in the
    given order. Raises ValueError if the lengths differ or batch_size < 1.
    """
    n = len(images)
    if len(labels) != n:
        raise ValueError(f"images and labels must have the same length, got {n} and {len(labels)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts = range(0, n - n % batch_size if drop_last else n, batch_size)
    if shuffle is None:
        return ((images[i : i + batch_size], labels[i : i + batch_size]) for i in starts)
    order = torch.randperm(n, generator=shuffle, device=shuffle.device).to(images.device)
    chosen = (order[i : i + batch_size] for i in starts)
    return ((images.index_select(0, index), labels.index_select(0, index)) for index in chosen)


# ---- finding ----


def _wanted(spec: DatasetSpec) -> str:
    places = [f"{spec.folder}/", *([spec.archive] if spec.archive else [])]
    return f"{' or '.join(places)} (torchvision layout), train-*.parquet (hub layout)"


def _folders(spec: DatasetSpec, root: Path) -> list[Path]:
    names = dict.fromkeys((spec.name, spec.hub_folder, f"{spec.name}/{spec.hub_folder}", "data"))
    return [root, *(root / name for name in names)]


def _find(spec: DatasetSpec, root: Path, part: tuple[int, int] | None) -> ImageSet | None:
    for folder in _folders(spec, root):
        if (folder / spec.folder).is_dir():
            return _read_torchvision(spec, folder)
        if any(folder.glob("train-*.parquet")) or any(folder.glob("test-*.parquet")):
            return _read_parquet(spec, folder, part)
        if spec.archive and (folder / spec.archive).is_file():
            return _read_archive(spec, folder / spec.archive)
    return None


def _load_cached(spec: DatasetSpec) -> ImageSet:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperfast"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{spec.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first process downloads, the others find it there
            spec.torchvision_class(str(cache), train=True, download=True)
    except Exception as error:  # network, disk, archive: all end in the same choices
        raise DataError(
            f"no {spec.name} data was given and downloading it to {cache} failed ({error}). Choose one: "
            f"--data DIR, or the environment variable HYPERFAST_DATA=DIR, where DIR holds {_wanted(spec)}"
        ) from error
    return _read_torchvision(spec, cache)


# ---- torchvision layout ----


def _read_torchvision(spec: DatasetSpec, root: Path) -> ImageSet:
    return (_read_idx if spec.is_idx else _read_pickles)(spec, root)


def _read_pickles(spec: DatasetSpec, root: Path) -> ImageSet:
    kind = spec.torchvision_class
    folder = root / spec.folder
    for name, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing")
        if not check_integrity(str(folder / name), md5):
            raise DataError(_changed(folder / name, md5))
    try:
        parts = [kind(str(root), train=train) for train in (True, False)]
    except Exception as error:  # pickle raises nearly anything
        raise DataError(f"cannot read {folder}: {error}") from error
    tensors = []
    for part, rows in zip(parts, (spec.train_rows, spec.test_rows), strict=True):
        images = torch.from_numpy(np.ascontiguousarray(np.asarray(part.data).transpose(0, 3, 1, 2)))
        labels = torch.tensor(part.targets, dtype=torch.int64)
        _check_rows(len(images), rows, folder)
        _check_labels(labels, spec, folder)
        tensors.append((images, labels))
    return ImageSet(*tensors[0], *tensors[1], _check_classes(parts[0].classes, spec, folder))


def _read_archive(spec: DatasetSpec, archive: Path) -> ImageSet:
    md5 = spec.torchvision_class.tgz_md5
    if not check_integrity(str(archive), md5):
        raise DataError(_changed(archive, md5))
    with tempfile.TemporaryDirectory() as folder:
        try:
            extract_archive(str(archive), folder)
        except Exception as error:
            raise DataError(f"cannot extract {archive} to {folder}: {error}") from error
        return _read_torchvision(spec, Path(folder))


def _read_idx(spec: DatasetSpec, root: Path) -> ImageSet:
    folder = root / spec.folder
    tensors = []
    for part, rows in (("train", spec.train_rows), ("t10k", spec.test_rows)):
        images_path, images = _idx(spec, folder / f"{part}-images-idx3-ubyte")
        labels_path, labels = _idx(spec, folder / f"{part}-labels-idx1-ubyte")
        for path, array, shape in (
            (images_path, images, (rows, *spec.image_shape[1:])),
            (labels_path, labels, (rows,)),
        ):
            if array.shape != shape:
                raise DataError(f"{path}: an array {list(array.shape)}, expected {list(shape)}")
        labels = torch.from_numpy(labels.astype(np.int64))
        _check_labels(labels, spec, labels_path)
        tensors.append((torch.from_numpy(images.copy()).unsqueeze(1), labels))
    return ImageSet(*tensors[0], *tensors[1], [str(i) for i in range(spec.num_classes)])


def _idx(spec: DatasetSpec, path: Path) -> tuple[Path, np.ndarray]:
    """The uint8 array in an idx file, or in the file packed as path.gz; and which of them it was."""
    packed = path.with_name(f"{path.name}.gz")
    sums = dict(spec.torchvision_class.resources) | spec.unpacked
    path = path if path.is_file() else packed
    if not path.is_file():
        raise DataError(f"{packed.with_suffix('')} is missing, packed ({packed.name}) or not")
    try:
        content = path.read_bytes()
        if hashlib.md5(content).hexdigest() != sums[path.name]:
            raise DataError(_changed(path, sums[path.name]))
        content = gzip.decompress(content) if path == packed else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return path, _idx_array(content, path)


def _idx_array(content: bytes, path: Path) -> np.ndarray:
    """Big-endian: two zero bytes, type 8 (uint8), number of dimensions, their sizes, the numbers."""
    start = 4 + 4 * content[3] if len(content) >= 4 else 0
    if start and len(content) >= start and content[:3] == b"\0\0\x08":
        sizes = np.frombuffer(content[4:start], ">u4").tolist()
        if len(content) - start == math.prod(sizes):
            return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
    raise DataError(f"{path} is not an idx file of bytes, or not all of it")


# ---- hub layout ----


class _Shard(NamedTuple):
    path: Path
    file: pq.ParquetFile
    image_column: str
    classes: list[str]


def _read_parquet(spec: DatasetSpec, folder: Path, part: tuple[int, int] | None) -> ImageSet:
    """part: (n, seed) of a `subset`, outside of which images stay black."""
    wanted = None
    if part is not None:
        wanted = _order(spec.train_rows, *part), torch.arange(min(part[0], spec.test_rows))
    parts = [_shards(folder, "train", spec, spec.train_rows), _shards(folder, "test", spec, spec.test_rows)]
    first, *others = [shard for shards in parts for shard in shards]
    for other in others:
        if other.classes != first.classes:
            raise DataError(f"the class names in {other.path} differ from those in {first.path}")
    tensors = []
    for i, (shards, rows) in enumerate(zip(parts, (spec.train_rows, spec.test_rows), strict=True)):
        images = torch.zeros((rows, *spec.image_shape), dtype=torch.uint8)
        labels = torch.empty(rows, dtype=torch.int64)
        decoded = torch.ones(rows, dtype=torch.bool)
        if wanted is not None:
            decoded = torch.zeros_like(decoded).index_fill_(0, wanted[i], True)
        start = 0
        for shard in shards:
            own = slice(start, start + shard.file.metadata.num_rows)
            _read_shard(spec, shard, images[own], labels[own], decoded[own].tolist())
            start = own.stop
        tensors.append((images, labels))
    return ImageSet(*tensors[0], *tensors[1], first.classes)


def _shards(folder: Path, part: str, spec: DatasetSpec, rows: int) -> list[_Shard]:
    """Open all shards of a part ("train" or "test") in order, after checking that none is missing."""
    found = sorted(path.name for path in folder.glob(f"{part}-*.parquet"))
    if not found:
        raise DataError(f"{folder} has no {part}-*.parquet")
    numbered = re.fullmatch(rf"{part}-\d+-of-(\d+)\.parquet", found[0])
    if numbered:
        count = int(numbered[1])
        wanted = [f"{part}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
        for what, names in (("missing", set(wanted) - set(found)), ("unexpected", set(found) - set(wanted))):
            if names:
                raise DataError(f"{what} in {folder}: {', '.join(sorted(names))}")
    shards = [_open_shard(spec, folder / name) for name in found]
    total = sum(shard.file.metadata.num_rows for shard in shards)
    _check_rows(total, rows, f"{folder}: {', '.join(found)}")
    return shards


def _open_shard(spec: DatasetSpec, path: Path) -> _Shard:
    try:
        file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    schema = file.schema_arrow
    column = next((name for name in spec.image_columns if name in schema.names), None)
    if column is None or spec.label not in schema.names:
        wanted = f"{spec.label} and {' or '.join(spec.image_columns)}"
        raise DataError(f"{path} is not {spec.name}: needs columns {wanted}, has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise DataError(f"{path}: column {column} is {kind}, not struct<bytes, path>")
    if not pa.types.is_integer(schema.field(spec.label).type):
        raise DataError(f"{path}: column {spec.label} is {schema.field(spec.label).type}, not integer")
    return _Shard(path, file, column, _class_names(spec, path, schema.metadata))


def _class_names(spec: DatasetSpec, path: Path, metadata: dict[bytes, bytes] | None) -> list[str]:
    """Class names from the schema's metadata; "0", "1", ... where it has none."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return [str(i) for i in range(spec.num_classes)]
    try:
        names = json.loads(text)["info"]["features"][spec.label]["names"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the metadata has no class names for {spec.label}") from error
    return _check_classes(names, spec, path)


def _read_shard(
    spec: DatasetSpec, shard: _Shard, images: Tensor, labels: Tensor, decoded: list[bool]
) -> None:
    """Decode a shard's images, those that are to be, and labels. In one thread: PIL holds Python's lock while
    it decodes."""
    pixels, row = images.numpy(), 0
    try:
        for batch in shard.file.iter_batches(ROWS_AT_ONCE, columns=[shard.image_column, spec.label]):
            column = batch.column(spec.label)
            if column.null_count:
                raise DataError(f"{shard.path}: column {spec.label} has empty rows")
            labels[row : row + len(batch)] = torch.from_numpy(column.cast(pa.int64()).to_numpy().copy())
            for cell in batch.column(shard.image_column).to_pylist():
                if decoded[row]:
                    _decode(cell, pixels[row], f"{shard.path}, row {row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {shard.path}: {error}") from error
    _check_labels(labels, spec, shard.path)


def _decode(cell: dict[str, bytes] | None, out: np.ndarray, where: str) -> None:
    """Decode one image file into out, uint8 [C, H, W]; where names it in errors."""
    data = cell and cell["bytes"]
    if not data:
        raise DataError(f"{where}: no image bytes")
    channels, height, width = out.shape
    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            size = image.size
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # PIL raises nearly anything on damaged files
        raise DataError(f"{where}: cannot decode the image ({error})") from error
    if size != (width, height):
        raise DataError(f"{where}: the image is {size[0]} x {size[1]} pixels, not {width} x {height}")
    out[:] = pixels.reshape(height, width, channels).transpose(2, 0, 1)


# ---- checks ----


def _changed(path: Path, md5: str) -> str:
    return f"{path} is truncated or changed: its md5 sum is not the official {md5}"


def _check_rows(rows: int, wanted: int, where: str | Path) -> None:
    if rows != wanted:
        raise DataError(f"{where}: {rows} images, expected {wanted}")


def _check_labels(labels: Tensor, spec: DatasetSpec, where: Path) -> None:
    wrong = ((labels < 0) | (labels >= spec.num_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{where}, row {row}: label {int(labels[row])} is not in 0..{spec.num_classes - 1}")


def _check_classes(names: object, spec: DatasetSpec, where: Path) -> list[str]:
    if not isinstance(names, list) or len(names) != spec.num_classes:
        raise DataError(f"{where}: expected {spec.num_classes} class names, got {names}")
    return [str(name) for name in names]
