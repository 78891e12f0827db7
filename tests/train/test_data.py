"""train/data.py on small synthetic sets in both layouts, and on the real ones if HYPERFAST_DATA is set."""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import datasets

from train import data
from train.data import DataError

CLASSES = ["ant", "bee", "cow", "dog", "eel"]
TRAIN, TEST = 23, 7


def arrays(rows, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8), rng.integers(0, len(CLASSES), rows)


def encode(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def write_parquet(path, images, labels, names=CLASSES, image="img", label="fine_label", cells=None):
    kinds = ("PNG", "WEBP")
    cells = cells or [{"bytes": encode(x, kinds[i % 2]), "path": None} for i, x in enumerate(images)]
    table = pa.table(
        {
            image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array(labels, pa.int64()),
        }
    )
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path):
    """The spec of the synthetic set; its torchvision class is given the md5 sums of the files made here."""

    class Tiny(datasets.CIFAR100):
        url = f"file://{tmp_path}/nowhere.tar.gz"

    return replace(data.CIFAR100, torchvision_class=Tiny, num_classes=5, train_rows=TRAIN, test_rows=TEST)


@pytest.fixture
def hub(tmp_path):
    """A folder in the hub's layout: two train shards and a test shard."""
    images, labels = arrays(TRAIN, 0)
    folder = tmp_path / "hub" / "cifar100"
    write_parquet(folder / "train-00000-of-00002.parquet", images[:12], labels[:12])
    write_parquet(folder / "train-00001-of-00002.parquet", images[12:], labels[12:])
    write_parquet(folder / "test-00000-of-00001.parquet", *arrays(TEST, 1))
    return folder


def write_pickles(folder, kind, labels=None, train_rows=TRAIN, classes=CLASSES):
    """cifar-100-python/ under folder; sets the md5 sums of kind to those of the files."""
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    sums = {}
    for name, rows, seed in (("train", train_rows, 0), ("test", TEST, 1)):
        images, fine = arrays(rows, seed)
        fine = fine if labels is None else labels[:rows]
        entry = {"data": images.reshape(rows, -1), "fine_labels": [int(v) for v in fine]}
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": classes}))
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    kind.train_list = [["train", sums["train"]]]
    kind.test_list = [["test", sums["test"]]]
    kind.meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    return base


def write_archive(folder, kind, source):
    """cifar-100-python.tar.gz in folder, made from the pickles of a folder `source`."""
    folder.mkdir()
    archive = folder / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / kind.base_folder, kind.base_folder)
    kind.tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    return archive


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a local HTTP server of tmp_path/tar."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "tar")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check(loaded):
    for part, rows, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        images, labels = arrays(rows, seed)
        got_images, got_labels = getattr(loaded, f"{part}_images"), getattr(loaded, f"{part}_labels")
        assert got_images.dtype == torch.uint8 and got_labels.dtype == torch.int64
        assert got_images.is_contiguous()
        assert torch.equal(got_images, torch.from_numpy(images))
        assert torch.equal(got_labels, torch.from_numpy(labels))
    assert loaded.classes == CLASSES


class TestHubLayout:
    def test_reads_png_and_webp_from_the_parent_and_from_the_folder_itself(self, tiny, hub):
        check(data.load(tiny, hub.parent))
        check(data.load(tiny, str(hub)))

    @pytest.mark.parametrize("n", [1, TEST + 3, TRAIN])
    def test_a_part_is_the_subset_and_nothing_else_is_decoded(self, tiny, hub, monkeypatch, n):
        decoded, decode = [], data._decode
        monkeypatch.setattr(data, "_decode", lambda cell, *own: decoded.append(cell) or decode(cell, *own))
        wanted = data.subset(data.load(tiny, hub), n, 5)
        del decoded[:]
        got = data.load(tiny, hub, (n, 5))
        assert len(decoded) == n + min(n, TEST)
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            assert torch.equal(getattr(got, name), getattr(wanted, name))
        assert got.classes == CLASSES
        with pytest.raises(DataError, match=f"a subset of 99 images, but there are {TRAIN}"):
            data.load(tiny, hub, (99, 5))

    def test_environment_variable(self, tiny, hub, monkeypatch):
        monkeypatch.setenv("HYPERFAST_DATA", str(hub.parent))
        check(data.load(tiny))

    def test_a_given_folder_wins_over_the_environment(self, tiny, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("HYPERFAST_DATA", str(tmp_path / "absent"))
        check(data.load(tiny, hub))

    def test_cifar10_columns_and_folder(self, tiny, tmp_path):
        spec = replace(tiny, name="cifar10", label="label", hub_folder="plain_text")
        for part, rows, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
            path = tmp_path / "cifar10" / "plain_text" / f"{part}-00000-of-00001.parquet"
            write_parquet(path, *arrays(rows, seed), image="image", label="label")
        check(data.load(spec, tmp_path))

    def test_without_class_names_they_are_numbers(self, tiny, hub):
        for path in hub.iterdir():
            pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
        assert data.load(tiny, hub).classes == ["0", "1", "2", "3", "4"]

    def fails(self, tiny, hub, *words):
        with pytest.raises(DataError) as caught:
            data.load(tiny, hub)
        for word in words:
            assert word in str(caught.value), str(caught.value)

    def test_missing_train_shard(self, tiny, hub):
        (hub / "train-00001-of-00002.parquet").unlink()
        self.fails(tiny, hub, "missing", str(hub), "train-00001-of-00002.parquet")

    def test_missing_test_part(self, tiny, hub):
        (hub / "test-00000-of-00001.parquet").unlink()
        self.fails(tiny, hub, str(hub), "test-*.parquet")

    def test_shards_of_two_versions(self, tiny, hub):
        (hub / "train-00002-of-00003.parquet").write_bytes(b"")
        self.fails(tiny, hub, "unexpected", "train-00002-of-00003.parquet")

    @pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
    def test_truncated_file(self, tiny, hub, keep):
        path = hub / "train-00001-of-00002.parquet"
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
        self.fails(tiny, hub, str(path))

    def test_damaged_pages(self, tiny, hub):
        path = hub / "train-00001-of-00002.parquet"
        content = bytearray(path.read_bytes())
        content[100 : len(content) // 2] = b"\xff" * (len(content) // 2 - 100)
        path.write_bytes(content)
        self.fails(tiny, hub, str(path))

    def test_wrong_row_count(self, tiny, hub):
        write_parquet(hub / "test-00000-of-00001.parquet", *arrays(TEST - 1, 1))
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "6 images, expected 7")

    @pytest.mark.parametrize("label", [-1, 5])
    def test_label_out_of_range(self, tiny, hub, label):
        images, labels = arrays(TEST, 1)
        labels[3] = label
        write_parquet(hub / "test-00000-of-00001.parquet", images, labels)
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "row 3", f"label {label}")

    def test_empty_label(self, tiny, hub):
        images, labels = arrays(TEST, 1)
        write_parquet(hub / "test-00000-of-00001.parquet", images, [None, *labels[1:].tolist()])
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "fine_label")

    @pytest.mark.parametrize("row", [0, 6])
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    @pytest.mark.parametrize("keep", [0, 1, 11, 40, -40])
    def test_damaged_image(self, tiny, hub, row, kind, keep):
        images, labels = arrays(TEST, 1)
        cells = [{"bytes": encode(image, kind), "path": None} for image in images]
        cells[row]["bytes"] = cells[row]["bytes"][:keep]
        write_parquet(hub / "test-00000-of-00001.parquet", images, labels, cells=cells)
        self.fails(tiny, hub, "test-00000-of-00001.parquet", f"row {row}")

    @pytest.mark.parametrize(
        "cell", [None, {"bytes": None, "path": "a.png"}, {"bytes": b"text", "path": None}]
    )
    def test_no_image(self, tiny, hub, cell):
        images, labels = arrays(TEST, 1)
        cells = [{"bytes": encode(image, "PNG"), "path": None} for image in images]
        cells[2] = cell
        write_parquet(hub / "test-00000-of-00001.parquet", images, labels, cells=cells)
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "row 2")

    def test_wrong_image_size(self, tiny, hub):
        images, labels = arrays(TEST, 1)
        cells = [{"bytes": encode(image, "PNG"), "path": None} for image in images]
        cells[4]["bytes"] = encode(images[4][:, :31], "PNG")
        write_parquet(hub / "test-00000-of-00001.parquet", images, labels, cells=cells)
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "row 4", "32 x 31 pixels")

    def test_another_data_set(self, tiny, hub):
        self.fails(replace(tiny, label="label"), hub, "train-00000-of-00002.parquet", "label", "fine_label")

    def test_image_column_of_another_type(self, tiny, hub):
        path = hub / "test-00000-of-00001.parquet"
        pq.write_table(pa.table({"img": [b""] * TEST, "fine_label": [0] * TEST}), path)
        self.fails(tiny, hub, str(path), "struct<bytes, path>")

    def test_label_column_of_another_type(self, tiny, hub):
        path = hub / "test-00000-of-00001.parquet"
        pq.write_table(pa.table({"img": [{"bytes": b""}] * TEST, "fine_label": ["ant"] * TEST}), path)
        self.fails(tiny, hub, str(path), "not integer")

    def test_class_names(self, tiny, hub):
        write_parquet(hub / "test-00000-of-00001.parquet", *arrays(TEST, 1), names=CLASSES[:4])
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "5 class names")
        write_parquet(hub / "test-00000-of-00001.parquet", *arrays(TEST, 1), names=CLASSES[::-1])
        self.fails(tiny, hub, "test-00000-of-00001.parquet", "differ")


class TestTorchvisionLayout:
    def test_reads_pickles(self, tiny, tmp_path):
        write_pickles(tmp_path / "tv", tiny.torchvision_class)
        check(data.load(tiny, tmp_path / "tv"))

    def test_reads_the_archive_and_leaves_its_folder_alone(self, tiny, tmp_path):
        write_pickles(tmp_path / "tv", tiny.torchvision_class)
        archive = write_archive(tmp_path / "tar", tiny.torchvision_class, tmp_path / "tv")
        check(data.load(tiny, archive.parent))
        assert [path.name for path in archive.parent.iterdir()] == [archive.name]

    @pytest.mark.parametrize("name", ["train", "test", "meta"])
    def test_missing_and_truncated_pickle(self, tiny, tmp_path, name):
        base = write_pickles(tmp_path / "tv", tiny.torchvision_class)
        (base / name).write_bytes((base / name).read_bytes()[:-1])
        with pytest.raises(DataError, match=f"{base / name} is truncated or changed"):
            data.load(tiny, tmp_path / "tv")
        (base / name).unlink()
        with pytest.raises(DataError, match=f"{base / name} is missing"):
            data.load(tiny, tmp_path / "tv")

    def test_truncated_archive(self, tiny, tmp_path):
        write_pickles(tmp_path / "tv", tiny.torchvision_class)
        archive = write_archive(tmp_path / "tar", tiny.torchvision_class, tmp_path / "tv")
        archive.write_bytes(archive.read_bytes()[:-100])
        with pytest.raises(DataError, match=f"{archive} is truncated or changed"):
            data.load(tiny, archive.parent)

    def test_unreadable_contents(self, tiny, tmp_path):
        base = write_pickles(tmp_path / "tv", tiny.torchvision_class)
        (base / "train").write_bytes(b"not a pickle")
        tiny.torchvision_class.train_list = [["train", hashlib.md5(b"not a pickle").hexdigest()]]
        with pytest.raises(DataError, match=f"cannot read {base}"):
            data.load(tiny, tmp_path / "tv")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train_rows": TRAIN + 1}, "24 images, expected 23"),
            ({"labels": [5] * TRAIN}, "row 0: label 5 is not in 0..4"),
            ({"classes": CLASSES[:3]}, "5 class names"),
        ],
    )
    def test_wrong_contents(self, tiny, tmp_path, change, message):
        write_pickles(tmp_path / "tv", tiny.torchvision_class, **change)
        with pytest.raises(DataError, match=message):
            data.load(tiny, tmp_path / "tv")


SIZE = 9  # pixels


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def grey(rows, seed):
    images, labels = arrays(rows, seed)
    return images[:, 0, :SIZE, :SIZE], labels


@pytest.fixture
def digits(tmp_path):
    """The spec of a synthetic MNIST, and write(name, content) into its folder, with the right md5 sums."""

    class MNIST(datasets.MNIST):  # torchvision names the folder after the class
        mirrors, resources = (f"file://{tmp_path}/nowhere/",), []

    folder, sums = tmp_path / "tv" / "MNIST" / "raw", {}
    folder.mkdir(parents=True)
    spec = replace(
        data.MNIST, torchvision_class=MNIST, unpacked=sums, num_classes=5, train_rows=TRAIN, test_rows=TEST,
        image_shape=(1, SIZE, SIZE),
    )  # fmt: skip

    def write(name, content):
        (folder / name).write_bytes(content)
        md5 = hashlib.md5(content).hexdigest()
        if name.endswith(".gz"):
            MNIST.resources = [*(r for r in MNIST.resources if r[0] != name), (name, md5)]
        else:
            sums[name] = md5

    for part, rows, seed in (("train", TRAIN, 0), ("t10k", TEST, 1)):
        images, labels = grey(rows, seed)
        write(f"{part}-images-idx3-ubyte", idx(images))
        write(f"{part}-labels-idx1-ubyte", idx(labels))
    return spec, folder, write


def pack(folder, write, keep=False):
    """Packs the files as torchvision's mirrors have them."""
    for path in list(folder.iterdir()):
        write(f"{path.name}.gz", gzip.compress(path.read_bytes()))
        if not keep:
            path.unlink()


def check_digits(loaded):
    for part, rows, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        images, labels = grey(rows, seed)
        got_images, got_labels = getattr(loaded, f"{part}_images"), getattr(loaded, f"{part}_labels")
        assert got_images.dtype == torch.uint8 and got_labels.dtype == torch.int64
        assert got_images.is_contiguous() and got_images.shape == (rows, 1, SIZE, SIZE)
        assert torch.equal(got_images[:, 0], torch.from_numpy(images))
        assert torch.equal(got_labels, torch.from_numpy(labels))
    assert loaded.classes == ["0", "1", "2", "3", "4"]


class TestIdxLayout:
    @pytest.mark.parametrize("packed", [False, True])
    def test_reads_packed_and_unpacked_files(self, digits, packed):
        spec, folder, write = digits
        if packed:
            pack(folder, write)
        check_digits(data.load(spec, folder.parents[1]))

    def test_each_file_may_be_packed_or_not(self, digits):
        spec, folder, write = digits
        pack(folder, write, keep=True)
        (folder / "train-images-idx3-ubyte").unlink()
        (folder / "t10k-labels-idx1-ubyte.gz").unlink()
        check_digits(data.load(spec, folder.parents[1]))

    def fails(self, spec, folder, *words):
        with pytest.raises(DataError) as caught:
            data.load(spec, folder.parents[1])
        for word in words:
            assert word in str(caught.value), str(caught.value)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("part", ["train", "t10k"])
    @pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
    def test_missing_truncated_and_changed(self, digits, packed, part, kind):
        spec, folder, write = digits
        if packed:
            pack(folder, write)
        path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
        content = path.read_bytes()
        for other in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
            path.write_bytes(other)
            self.fails(spec, folder, f"{path} is truncated or changed")
        path.unlink()
        self.fails(spec, folder, f"{folder}/{part}-{kind}-ubyte is missing")

    @pytest.mark.parametrize("content", [b"", b"\0\0", b"\0\0\x08\x03\0\0", b"\0\0\x09\x01\0\0\0\x00"])
    def test_no_idx_file(self, digits, content):
        spec, folder, write = digits
        write("t10k-labels-idx1-ubyte", content)
        self.fails(spec, folder, "t10k-labels-idx1-ubyte", "not an idx file")

    def test_fewer_numbers_than_the_header_says(self, digits):
        spec, folder, write = digits
        write("train-images-idx3-ubyte", idx(grey(TRAIN, 0)[0])[:-1])
        self.fails(spec, folder, "train-images-idx3-ubyte", "not all of it")

    def test_packed_file_that_is_none(self, digits):
        spec, folder, write = digits
        pack(folder, write)
        for content in (b"no gzip", gzip.compress(b"\0\0\x08\x01")[:-9]):
            write("train-labels-idx1-ubyte.gz", content)
            self.fails(spec, folder, "cannot read", "train-labels-idx1-ubyte.gz")

    def test_wrong_contents(self, digits):
        spec, folder, write = digits
        write("t10k-labels-idx1-ubyte", idx([0, 4, 5, 0, 0, 0, 0]))
        self.fails(spec, folder, "t10k-labels-idx1-ubyte", "row 2: label 5 is not in 0..4")
        write("t10k-labels-idx1-ubyte", idx([0] * (TEST + 1)))
        self.fails(spec, folder, "t10k-labels-idx1-ubyte", "[8]", "[7]")
        write("train-images-idx3-ubyte", idx(grey(TRAIN, 0)[0][:, 1:]))
        self.fails(spec, folder, "train-images-idx3-ubyte", f"[{TRAIN}, 8, 9]", f"[{TRAIN}, 9, 9]")

    def test_download_into_the_cache_once(self, digits, tmp_path, server):
        spec, folder, write = digits
        pack(folder, write)
        spec.torchvision_class.mirrors = (f"{server}/",)
        folder.rename(tmp_path / "tar")
        check_digits(data.load(spec))
        (tmp_path / "tar").rename(tmp_path / "gone")
        check_digits(data.load(spec))

    def test_nothing_found(self, digits, tmp_path):
        spec, _, _ = digits
        with pytest.raises(DataError) as caught:
            data.load(spec)
        for word in ("--data", "HYPERFAST_DATA", "MNIST/raw/ (torchvision", "train-*.parquet"):
            assert word in str(caught.value)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="no mnist data under .*empty: looked for MNIST/raw/"):
            data.load(spec, tmp_path / "empty")

    def test_hub_layout_of_grey_images(self, digits, tmp_path):
        spec, _, _ = digits
        for part, rows, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
            images, labels = grey(rows, seed)
            cells = []
            for i, image in enumerate(images):  # lossless WebP knows no grey: it comes back as RGB
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, ("PNG", "WEBP")[i % 2], lossless=True)
                cells.append({"bytes": buffer.getvalue(), "path": None})
            path = tmp_path / "hub" / "mnist" / f"{part}-00000-of-00001.parquet"
            write_parquet(path, images, labels, None, "image", "label", cells)
        check_digits(data.load(spec, tmp_path / "hub"))


class TestFinding:
    def test_folder_without_data_is_an_error_and_downloads_nothing(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(tiny.torchvision_class, "download", lambda self: pytest.fail("downloaded"))
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(DataError) as caught:
            data.load(tiny, empty)
        for word in (str(empty), "cifar-100-python/", "cifar-100-python.tar.gz", "train-*.parquet"):
            assert word in str(caught.value)

    def test_folder_that_does_not_exist(self, tiny, tmp_path, monkeypatch):
        with pytest.raises(DataError, match=f"{tmp_path / 'absent'} does not exist"):
            data.load(tiny, tmp_path / "absent")
        monkeypatch.setenv("HYPERFAST_DATA", str(tmp_path / "absent"))
        with pytest.raises(DataError, match=f"{tmp_path / 'absent'} does not exist"):
            data.load(tiny)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="'cifar1000'.*cifar10, cifar100, mnist"):
            data.load_images("cifar1000")

    def test_download_into_the_cache_once(self, tiny, tmp_path, server):
        kind = tiny.torchvision_class
        write_pickles(tmp_path / "tv", kind)
        archive = write_archive(tmp_path / "tar", kind, tmp_path / "tv")
        kind.url = f"{server}/{archive.name}"
        check(data.load(tiny))
        assert (tmp_path / "cache" / "hyperfast" / "cifar-100-python" / "train").is_file()
        archive.unlink()
        check(data.load(tiny))

    def test_one_process_of_a_machine_downloads_and_the_others_wait(self, tiny, tmp_path, server):
        kind = tiny.torchvision_class
        write_pickles(tmp_path / "tv", kind)
        kind.url = f"{server}/{write_archive(tmp_path / 'tar', kind, tmp_path / 'tv').name}"
        at_once, most, made = [], [], kind.__init__

        def init(self, *args, download=False, **options):
            at_once.append(download)
            most.append(sum(at_once))
            time.sleep(0.1 * download)
            made(self, *args, download=download, **options)
            at_once.remove(download)

        kind.__init__ = init
        with ThreadPoolExecutor(3) as pool:
            for loaded in [pool.submit(data.load, tiny) for _ in range(3)]:
                check(loaded.result())
        assert max(most) == 1

    def test_truncated_download(self, tiny, tmp_path, server):
        kind = tiny.torchvision_class
        write_pickles(tmp_path / "tv", kind)
        archive = write_archive(tmp_path / "tar", kind, tmp_path / "tv")
        kind.url = f"{server}/{archive.name}"
        content = archive.read_bytes()
        archive.write_bytes(content[:-100])
        with pytest.raises(DataError, match="--data DIR"):
            data.load(tiny)
        archive.write_bytes(content)
        check(data.load(tiny))

    def test_failed_download_names_the_choices(self, tiny, tmp_path):
        with pytest.raises(DataError) as caught:
            data.load(tiny)
        for word in (
            "--data",
            "HYPERFAST_DATA",
            "cifar-100-python/",
            "train-*.parquet",
            str(tmp_path / "cache"),
        ):
            assert word in str(caught.value)


class TestSplit:
    def test_is_a_seeded_permutation(self):
        train, validation = data.split(100, 10, seed=42)
        assert (len(train), len(validation)) == (90, 10)
        assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(100))
        assert not torch.equal(train, train.sort().values)
        again = data.split(100, 10, seed=42)
        assert torch.equal(again[0], train) and torch.equal(again[1], validation)
        assert not torch.equal(data.split(100, 10, seed=43)[1], validation)

    def test_does_not_touch_the_default_generator(self):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        data.split(10, 2, seed=1)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("validation", [-1, 10, 11])
    def test_bad_size(self, validation):
        with pytest.raises(ValueError, match="validation"):
            data.split(10, validation, seed=0)

    def test_without_validation(self):
        train, validation = data.split(10, 0, seed=0)
        assert (len(train), len(validation)) == (10, 0)


class TestBatches:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous()
    labels = torch.arange(10)

    def test_in_order(self):
        got = list(data.batches(self.images, self.labels, 4, shuffle=None, drop_last=False))
        assert [len(labels) for _, labels in got] == [4, 4, 2]
        assert torch.equal(torch.cat([images for images, _ in got]), self.images)
        assert torch.equal(torch.cat([labels for _, labels in got]), self.labels)

    def test_drop_last(self):
        for shuffle in (None, torch.Generator()):
            got = list(data.batches(self.images, self.labels, 4, shuffle=shuffle, drop_last=True))
            assert [len(labels) for _, labels in got] == [4, 4]
        assert len(list(data.batches(self.images, self.labels, 5, shuffle=None, drop_last=True))) == 2
        assert not list(data.batches(self.images, self.labels, 11, shuffle=None, drop_last=True))

    def test_shuffled_pairs_stay_together_and_every_epoch_differs(self):
        generator = torch.Generator().manual_seed(0)
        orders = []
        for _ in range(2):
            got = list(data.batches(self.images, self.labels, 3, shuffle=generator, drop_last=False))
            order = torch.cat([labels for _, labels in got])
            assert torch.equal(torch.cat([images for images, _ in got]), self.images[order])
            assert torch.equal(order.sort().values, self.labels)
            orders.append(order)
        assert not torch.equal(*orders)
        again = data.batches(
            self.images, self.labels, 10, shuffle=torch.Generator().manual_seed(0), drop_last=False
        )
        assert torch.equal(next(again)[1], orders[0])

    def test_draws_the_order_when_called(self):
        generator = torch.Generator().manual_seed(0)
        iterator = data.batches(self.images, self.labels, 10, shuffle=generator, drop_last=False)
        torch.rand(5, generator=generator)
        want = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        assert torch.equal(next(iterator)[1], want)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="batch_size"):
            data.batches(self.images, self.labels, 0, shuffle=None, drop_last=False)
        with pytest.raises(ValueError, match="same length, got 10 and 9"):
            data.batches(self.images, self.labels[:9], 2, shuffle=None, drop_last=False)


@pytest.mark.parametrize(
    ("name", "mean", "first"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), "airplane"),
        ("cifar100", (0.5071, 0.4865, 0.4409), "apple"),
    ],
)
def test_real_data(name, mean, first, real_data):
    loaded = data.load_images(name, real_data)
    classes = len(loaded.classes)
    assert loaded.train_images.shape == (50_000, 3, 32, 32) and loaded.test_images.shape == (
        10_000,
        3,
        32,
        32,
    )
    assert loaded.classes[0] == first and f"cifar{classes}" == name
    assert (loaded.train_labels.bincount(minlength=classes) == 50_000 // classes).all()
    assert (loaded.test_labels.bincount(minlength=classes) == 10_000 // classes).all()
    got = loaded.train_images.sum((0, 2, 3)) / (255 * 50_000 * 32 * 32)
    assert torch.allclose(got, torch.tensor(mean), atol=5e-5)


def test_real_digits(real_data):
    loaded = data.load_images("mnist", real_data)
    assert loaded.train_images.shape == (60_000, 1, 28, 28) and loaded.test_images.shape == (
        10_000,
        1,
        28,
        28,
    )
    assert loaded.classes == [str(i) for i in range(10)]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert loaded.train_labels.bincount().tolist() == counts
    pixels = loaded.train_images / 255
    assert [round(float(v), 4) for v in (pixels.mean(), pixels.std())] == [0.1307, 0.3081]


REAL_DATA = os.environ.get("HYPERFAST_DATA")


@pytest.fixture
def real_data():
    if not REAL_DATA:
        pytest.skip("needs HYPERFAST_DATA")
    return REAL_DATA
