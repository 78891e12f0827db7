"""train/augmentations.py: AutoAugment and CutMix against torchvision's with the same draws."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torchvision.transforms import v2

from tests.train import tiny
from tests.train.test_augment import random_images, seeded
from tests.train.test_loop import assert_same, last
from train.augment import Augment, Box, normalize, sample_pixel
from train.augmentations import AUGMENTATIONS, MIXES, AutoAugment, CutMix, Draws, sample_mix
from train.images import ImageData
from train.losses import LOSSES, CenterLoss, WithCenters

HALF = (0.5, 0.5, 0.5)


def theirs(image, policy, use, sign):
    """torchvision's AutoAugment of one image with these draws, which it asks for as it goes."""
    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    numbers = []
    for place, (name, probability, _) in enumerate(transform._policies[policy]):
        numbers.append(use[place])
        if use[place] <= probability and transform._AUGMENTATION_SPACE[name][1]:
            numbers.append(sign[place])
    given = iter(numbers)
    with (
        mock.patch("torch.rand", lambda shape: next(given)),
        mock.patch("torch.randint", lambda high, shape: policy),
    ):
        out = transform(image)
    assert next(given, None) is None
    return out


class TestAutoAugment:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 27)])
    def test_equals_torchvision(self, height, width):
        """Every operation of every policy with both signs, then as drawn."""
        transform, every = AutoAugment(), torch.arange(25).repeat(4)
        sign = torch.tensor(list(itertools.product((0.2, 0.9), repeat=2))).repeat_interleave(25, 0)
        drawn = transform.draw(40, seeded())
        draws = Draws(*(torch.cat(v) for v in zip((every, torch.zeros(100, 2), sign), drawn, strict=True)))
        images = random_images(140, height, width)
        images[::2] = images[::2] // 3 + 40  # for AutoContrast and Equalize
        images[5] = 77
        before = images.clone()
        got = transform.apply(images, draws)
        assert torch.equal(images, before) and got.dtype == torch.uint8
        for i, (image, *draw) in enumerate(zip(images, *draws, strict=True)):
            assert torch.equal(got[i], theirs(image, *draw)), i
        assert (got[:100] != images[:100]).flatten(1).any(1).sum() > 90

    def test_draws(self):
        """All uniform and independent, as torchvision's are."""
        n = 20_000
        policy, use, sign = AutoAugment().draw(n, seeded())
        counts = policy.bincount(minlength=25)
        assert len(counts) == 25 and (counts - n / 25).abs().max() < 5 * math.sqrt(n / 25)
        numbers = torch.cat((use, sign, policy.unsqueeze(1) / 24), 1).T
        assert ((numbers.mean(1) - 0.5).abs() < 5 * 0.32 / math.sqrt(n)).all()
        assert numbers.min() >= 0 and numbers.max() <= 1 and numbers.dtype == torch.float32
        assert (torch.corrcoef(numbers) - torch.eye(5)).abs().max() < 5 / math.sqrt(n)

    def test_each_image_has_its_own(self):
        got = AutoAugment()(random_images(1).expand(64, -1, -1, -1), seeded())
        assert len(got.flatten(1).unique(dim=0)) > 20

    def test_generator_alone_or_the_default_one(self):
        images, transform = random_images(16), AutoAugment()
        torch.manual_seed(0)
        state = torch.get_rng_state()
        generator = seeded(3)
        first, second = transform(images, generator), transform(images, generator)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, transform(images, seeded(3))) and not torch.equal(first, second)
        default = transform(images)
        torch.manual_seed(0)
        assert torch.equal(transform(images), default)

    def test_no_images(self):
        assert AutoAugment()(random_images(0), seeded()).shape == (0, 3, 32, 32)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_on_a_gpu(self):
        images, transform = random_images(512), AutoAugment()
        draws = transform.draw(512, seeded())
        got = transform.apply(images.cuda(), draws)
        # sums in another order: a level up or down, a pixel on the border of two
        close = (got.cpu().int() - transform.apply(images, draws).int()).abs() <= 1
        assert got.is_cuda and close.float().mean() > 0.999
        on_device = transform(images.cuda(), torch.Generator("cuda").manual_seed(0))
        assert on_device.is_cuda and not torch.equal(on_device, images.cuda())


def paper_box(ratio, row, column, height, width):
    """Equation 2 with half sides in whole pixels, cut at the border: top, left, bottom, right."""
    tall, wide = int(height * ratio / 2), int(width * ratio / 2)
    return max(row - tall, 0), max(column - wide, 0), min(row + tall, height), min(column + wide, width)


class TestCutMix:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 24), (5, 1)])
    def test_box(self, height, width):
        """The draws are pixel and lambda, in this order."""
        n, generator = 300, seeded(2)
        box = sample_mix(n, height, width, seeded(2))
        row, column = sample_pixel(n, height, width, generator)
        lam = torch.rand(n, generator=generator, dtype=torch.float64)
        for i in range(n):
            ratio = math.sqrt(1 - lam[i].item())
            top, left, bottom, right = paper_box(ratio, int(row[i]), int(column[i]), height, width)
            assert [int(v[i]) for v in box] == [top, left, bottom - top, right - left]

    def test_equals_torchvision(self):
        """Batch by batch, each with its own box, all at once."""
        sizes, batch, generator = (20, 28), 6, seeded(2)
        images, labels = random_images(24, *sizes).float(), torch.randint(10, (24,), generator=seeded())
        mixed, targets = CutMix(10)(images, labels, batch, seeded(2))
        row, column = sample_pixel(4, *sizes, generator)
        lam = torch.rand(4, generator=generator, dtype=torch.float64)
        for i in range(4):
            part = slice(batch * i, batch * (i + 1))
            transform = v2.CutMix(num_classes=10)
            transform._dist = mock.Mock(sample=lambda shape, value=lam[i]: value)
            places = iter((column[i : i + 1], row[i : i + 1]))
            with mock.patch("torch.randint", lambda high, size, places=places: next(places)):
                x, y = transform(images[part], labels[part])
            assert torch.equal(mixed[part], x)
            torch.testing.assert_close(targets[part], y)

    def test_targets_are_the_true_areas(self):
        """Images of one colour each: what is in an image is counted."""
        n, batch, size = 600, 4, 16
        images = torch.arange(float(batch)).repeat(n // batch).view(n, 1, 1, 1).expand(n, 2, size, size)
        labels = torch.arange(batch).repeat(n // batch)
        before = images.clone()
        mixed, targets = CutMix(batch + 1)(images, labels, batch, seeded())
        counted = torch.stack([(mixed == k).flatten(1).float().mean(1) for k in range(batch + 1)], 1)
        torch.testing.assert_close(targets, counted, rtol=0, atol=1e-6)
        assert torch.equal(images, before) and targets.dtype == torch.float32
        own = targets.gather(1, labels.unsqueeze(1)).view(-1, batch)
        assert torch.equal(own, own[:, :1].expand_as(own)) and len(own[:, 0].unique()) > 20
        neighbour = targets.gather(1, ((labels - 1) % batch).unsqueeze(1))
        torch.testing.assert_close(neighbour.view(-1, batch), 1 - own)
        assert own.min() < 0.3 and own.max() > 0.9

    def test_the_same_class(self):
        mixed, targets = CutMix(3)(random_images(8).float(), torch.ones(8, dtype=torch.int64), 4, seeded())
        assert torch.equal(targets, torch.tensor([0.0, 1.0, 0.0]).expand(8, 3))

    def test_whole_and_empty_boxes(self):
        images, labels = random_images(4, 8, 8).float(), torch.arange(4)
        for side, shift in ((8, 1), (0, 0)):
            box = Box(*(torch.tensor([v]) for v in (0, 0, side, side)))
            mixed, targets = CutMix(4).apply(images, labels, box)
            assert torch.equal(mixed, images.roll(shift, 0))
            assert torch.equal(targets, torch.eye(4).roll(shift, 0))

    def test_shares(self):
        """Mean share of the box over many batches, against the paper's equations on a fine grid of lambda."""
        box, n = sample_mix(20_000, 32, 32, seeded()), 20_000
        got = (box.height * box.width).double() / 32**2
        wanted = []
        for lam in torch.linspace(0, 1, 401)[:-1] + 1 / 800:
            half = int(32 * math.sqrt(1 - lam) / 2)
            side = sum(min(c + half, 32) - max(c - half, 0) for c in range(32)) / 32
            wanted.append(side**2 / 32**2)  # row and column are independent
        assert abs(got.mean() - sum(wanted) / 400) < 5 * got.std() / math.sqrt(n) + 1e-3

    def test_bad_batches(self):
        with pytest.raises(ValueError, match="whole batches of 4, got 6"):
            CutMix(3)(random_images(6).float(), torch.zeros(6, dtype=torch.int64), 4, seeded())

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_on_a_gpu(self):
        images, labels, box = (
            random_images(64).float(),
            torch.arange(64) % 10,
            sample_mix(4, 32, 32, seeded()),
        )
        got = CutMix(10).apply(images.cuda(), labels.cuda(), box)
        for a, b in zip(got, CutMix(10).apply(images, labels, box), strict=True):
            torch.testing.assert_close(a.cpu(), b)
        images, labels, generator = images.cuda(), labels.cuda(), torch.Generator("cuda").manual_seed(0)
        torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
        try:
            CutMix(10)(images, labels, 16, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestNames:
    @pytest.mark.parametrize("name", AUGMENTATIONS)
    def test_output(self, name):
        images = random_images(1).expand(40, -1, -1, -1)
        transform = AUGMENTATIONS[name](HALF, HALF)
        got = transform(images, seeded(1))
        assert got.shape == images.shape and got.dtype == torch.float32 and got.abs().max() <= 1
        assert torch.equal(got, transform(images, seeded(1)))
        kinds = len(got.flatten(1).unique(dim=0))
        assert kinds == 1 if name == "none" else kinds > 20

    def test_what_is_added_to_crop_and_flip(self):
        images = random_images(64)
        plain = AUGMENTATIONS["crop_flip"](HALF, HALF)(images, seeded())
        made = {name: make(HALF, HALF)(images, seeded()) for name, make in AUGMENTATIONS.items()}
        assert torch.equal(made["none"], normalize(images, HALF, HALF))
        assert torch.equal(made["cutmix"], plain)
        changed = (made["cutout"] != plain).flatten(1).float().mean(1)
        assert (changed > 0.05).all() and (changed <= 0.25).all()
        assert (made["cutout"][made["cutout"] != plain] == 0).all()
        for name in ("autoaugment", "jitter", "rotation"):
            assert (made[name] != plain).flatten(1).any(1).sum() > 25
        assert MIXES.keys() <= AUGMENTATIONS.keys() and isinstance(MIXES["cutmix"](10), CutMix)


# ---- as the data of a run ----


def mixing_data():
    """That of tiny.py with all of it at once, and a loss that keeps centers."""
    data = tiny.data()
    data.criterion = CenterLoss(0.1)
    data.augment = Augment(HALF, HALF, crop_padding=1, erasing=0, policy=AutoAugment(), cutout=2)
    data.mix = CutMix(5)
    return data


@pytest.mark.parametrize("at_once", [1, 24, 1000])
def test_mixed_batches(at_once):
    data = mixing_data()
    data.at_once = at_once
    made, again = (list(data.batches(0, 1, 8)) for _ in range(2))
    assert len(made) == data.steps(8) == 6
    for (x, y), (u, v) in zip(made, again, strict=True):
        assert x.shape == (8, 3, 6, 6) and x.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == (8, 5) and torch.equal(x, u) and torch.equal(y, v)
        torch.testing.assert_close(y.sum(1), torch.ones(8))
    largest = [y.max(1).values.min().item() for _, y in made]
    assert len(set(largest)) > 2  # a box for each batch
    labels = torch.cat([y for _, y in data.batches(0, 1, 8)])
    data.mix = None
    order = torch.cat([y for _, y in data.batches(0, 1, 8)])
    assert (labels.gather(1, order.unsqueeze(1)) > 0).sum() > 30


def test_right_is_the_class_with_the_larger_share():
    y = torch.tensor([[0.7, 0.3, 0], [0.4, 0, 0.6], [0, 1, 0], [0.2, 0.8, 0]])
    logits = torch.eye(3)[[0, 0, 1, 0]].requires_grad_()
    data = mixing_data()
    data.criterion = LOSSES["cross_entropy"]()
    loss, right = data.loss(lambda x: logits, torch.zeros(4), y)
    assert right.item() == 2
    torch.testing.assert_close(loss, -(y * logits.log_softmax(1)).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - y).detach() / 4)
    assert "larger share" in data.steps_see and "larger share" not in tiny.data().steps_see


def test_a_mixing_run_counts_images_and_resumes_bit_for_bit(tmp_path):
    def make(out, **config):
        options = {"net": lambda backend: WithCenters(tiny.Net(backend=backend), 5), "epochs": 2}
        return tiny.make(tmp_path / out, parts=mixing_data(), **options, **config)

    whole = make("whole")
    whole.fit()
    for row in whole.history:
        assert row["images_per_second"] * row["seconds"] == pytest.approx(48)
        assert 0 <= row["train_accuracy"] <= 100
    make("parts", max_steps=6).fit()
    resumed = make("parts")
    resumed.resume()
    resumed.fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert whole.model.centers.any() and torch.equal(resumed.model.centers, whole.model.centers)


def test_a_device_keeps_the_options():
    data = mixing_data()
    moved = data.to(torch.device("cpu"))
    assert isinstance(moved, ImageData) and moved.at_once == 1
    assert (moved.mix, moved.criterion, moved.augment) == (data.mix, data.criterion, data.augment)
