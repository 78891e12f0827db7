"""train/augment.py against torchvision: each transform for equal parameters, the samplers, the whole."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as F
from PIL import Image

from train import augment
from train.augment import Augment, Box, Jitter

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
OPTIONS = "crop_padding flip degrees brightness contrast saturation hue erasing".split()
CPU = torch.device("cpu")
SIZES = [(32, 32), (17, 24), (5, 1)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(batch, height=32, width=32, seed=0):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=seeded(seed))


def color_images(batch, seed=0):
    """float [batch, 3, 32, 32] in [0, 1], with grays, black, white and pure colours among the pixels."""
    images = torch.rand(batch, 3, 32, 32, generator=seeded(seed))
    images[:, :, :4] = images[:, :1, :4]
    images[:, :, 4:8] = images[:, :, 4:8].round()
    images[:, 1, 8:12] = images[:, 0, 8:12]  # two equal channels
    images[:, 2, 12:16] = images[:, 0, 12:16]
    return images


def pil_crop_flip_rotate(image, top, left, flip, angle, padding):
    height, width = image.shape[1:]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = F.crop(F.pad(picture, [padding]), top, left, height, width)
    picture = F.rotate(F.horizontal_flip(picture) if flip else picture, angle)
    return F.pil_to_tensor(picture)


class TestCropFlipRotate:
    @pytest.mark.parametrize(("height", "width"), SIZES)
    @pytest.mark.parametrize("padding", [0, 1, 4])
    def test_crop_and_flip_are_exact(self, height, width, padding):
        corners = [(i, j) for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        n = 2 * len(corners)
        images = random_images(n, height, width)
        top, left = (torch.tensor(v * 2) for v in zip(*corners, strict=True))
        flip = torch.arange(n) < n // 2
        got = augment.crop_flip_rotate(images, top, left, flip, torch.zeros(n), padding)
        for i in range(n):
            want = F.crop(F.pad(images[i], [padding]), int(top[i]), int(left[i]), height, width)
            assert torch.equal(got[i], F.horizontal_flip(want) if flip[i] else want)

    @pytest.mark.parametrize(("height", "width"), SIZES)
    @pytest.mark.parametrize("degrees", [15, 180])
    def test_rotation_equals_pil_but_for_rounding(self, height, width, degrees):
        n = 40
        images = random_images(n, height, width).clamp_(min=1)
        generator = seeded(1)
        top, left = augment.sample_crop(n, 4, generator)
        flip = augment.sample_flip(n, 0.5, generator)
        angle = augment.sample_angle(n, degrees, generator)
        got = augment.crop_flip_rotate(images, top, left, flip, angle, 4)
        parameters = zip(images, top.tolist(), left.tolist(), flip.tolist(), angle.tolist(), strict=True)
        want = torch.stack([pil_crop_flip_rotate(*sample, 4) for sample in parameters])
        # A point on the border of two pixels may fall to either; PIL computes in 16-bit fixed point.
        assert ((got != want).any(1)).float().mean() < 2e-3

    def test_rotation_reads_zero_outside_the_crop(self):
        """The padded image goes on outside the crop; torchvision has cut it off by then."""
        images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
        zero = torch.zeros(1, dtype=torch.int64)
        got = augment.crop_flip_rotate(images, zero + 8, zero + 8, zero.bool(), torch.tensor([15.0]), 8)
        assert (got[0, :, 0, 0] == 0).all() and (got[0, :, 31, 31] == 0).all()
        assert (got[0, :, 16, 16] == 200).all()

    def test_direction_of_the_rotation(self):
        images = torch.zeros(1, 3, 3, 3, dtype=torch.uint8)
        images[:, :, 1, 2] = 9  # right of the centre goes above it
        zero = torch.zeros(1, dtype=torch.int64)
        got = augment.crop_flip_rotate(images, zero, zero, zero.bool(), torch.tensor([90.0]), 0)
        assert got[0, 0].nonzero().tolist() == [[0, 1]]


class TestColor:
    @pytest.mark.parametrize("operation", range(4))
    def test_equals_torchvision(self, operation):
        ours = augment.ADJUSTMENTS[operation]
        theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[operation]
        factors = (
            [-0.5, -0.3, -0.1, 0.0, 0.07, 0.1, 0.5] if operation == 3 else [0.0, 0.5, 0.8, 1.0, 1.2, 3.0]
        )
        images = color_images(len(factors))
        before = images.clone()
        got = ours(images, torch.tensor(factors))
        want = torch.stack([theirs(image, factor) for image, factor in zip(images, factors, strict=True)])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert torch.equal(images, before)

    def test_jitter_follows_each_samples_order(self):
        orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]).repeat(6, 1)
        factors = augment.sample_jitter(len(orders), 0.4, 0.4, 0.4, 0.2, seeded()).factors
        images = color_images(len(orders))
        theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        want = []
        for image, order, factor in zip(images.clone(), orders.tolist(), factors.tolist(), strict=True):
            for operation in order:
                image = theirs[operation](image, factor[operation])
            want.append(image)
        got = augment.color_jitter_(images, Jitter(orders, factors))
        assert got is images
        torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-5)


class TestNormalize:
    def test_equals_torchvision(self):
        images = random_images(3)
        before = images.clone()
        want = F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD)
        torch.testing.assert_close(augment.normalize(images, MEAN, STD), want, rtol=0, atol=1e-6)
        assert torch.equal(images, before)

    def test_floats_are_not_scaled_nor_changed(self):
        images = color_images(2)
        before = images.clone()
        got = augment.normalize(images, MEAN, STD)
        torch.testing.assert_close(got, F.normalize(images, MEAN, STD), rtol=0, atol=1e-6)
        assert torch.equal(images, before)

    def test_one_channel(self):
        got = augment.normalize(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), (0.5,), (0.25,))
        assert torch.equal(got, torch.full((2, 1, 4, 4), 2.0))

    def test_bad_input(self):
        with pytest.raises(TypeError, match="int64"):
            augment.normalize(torch.zeros(1, 3, 4, 4, dtype=torch.int64), MEAN, STD)
        with pytest.raises(TypeError, match="ndarray"):
            augment.normalize(np.zeros((1, 3, 4, 4), np.uint8), MEAN, STD)
        with pytest.raises(ValueError, match=r"\[3, 4, 4\]"):
            augment.normalize(torch.zeros(3, 4, 4, dtype=torch.uint8), MEAN, STD)
        with pytest.raises(ValueError, match="C = 3"):
            augment.normalize(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), MEAN, STD)


def test_erase_equals_torchvision():
    boxes = [(0, 0, 32, 32), (0, 0, 0, 0), (3, 5, 7, 2), (31, 31, 1, 1), (0, 8, 32, 4)]
    images = color_images(len(boxes))
    want = [F.erase(image, *box, v=torch.zeros(1, 1, 1)) for image, box in zip(images, boxes, strict=True)]
    got = augment.erase_(images, Box(*torch.tensor(boxes).T))
    assert got is images
    assert torch.equal(got, torch.stack(want))


class TestSamplers:
    n = 20_000
    tolerance = 4 / math.sqrt(n)  # four standard errors of a variable with standard deviation 1

    def test_crop(self):
        top, left = augment.sample_crop(self.n, 4, seeded())
        for v in (top, left):
            share = v.bincount() / self.n
            assert len(share) == 9
            assert (share - 1 / 9).abs().max() < self.tolerance * math.sqrt(1 / 9)
        assert torch.stack([top, left]).float().corrcoef()[0, 1].abs() < self.tolerance

    @pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
    def test_flip(self, probability):
        flip = augment.sample_flip(self.n, probability, seeded())
        assert flip.dtype == torch.bool
        deviation = math.sqrt(probability * (1 - probability))
        assert abs(flip.float().mean() - probability) <= self.tolerance * deviation

    def check_uniform(self, values, low, high):
        assert low <= values.min() and values.max() <= high
        edges = torch.linspace(low, high, 11)
        share = torch.histogram(values, edges).hist / len(values)
        assert (share - 0.1).abs().max() < self.tolerance * 0.3

    def test_angle(self):
        self.check_uniform(augment.sample_angle(self.n, 15, seeded()), -15, 15)

    def test_jitter(self):
        jitter = augment.sample_jitter(self.n, 0.2, 0.4, 1.5, 0.1, seeded())
        for column, (low, high) in enumerate([(0.8, 1.2), (0.6, 1.4), (0, 2.5), (-0.1, 0.1)]):
            self.check_uniform(jitter.factors[:, column].contiguous(), low, high)
        assert torch.equal(jitter.order.sort(1).values, torch.arange(4).expand(self.n, 4))
        share = (jitter.order @ torch.tensor([64, 16, 4, 1])).bincount() / self.n
        share = share[share > 0]
        assert len(share) == 24
        assert (share - 1 / 24).abs().max() < self.tolerance * math.sqrt(1 / 24)

    def test_erasing_equals_torchvision(self):
        """Same moments of height, width and place as RandomErasing.get_params."""
        box = augment.sample_erasing(self.n, 32, 32, 1.0, seeded())
        torch.manual_seed(0)
        image = torch.empty(3, 32, 32)
        want = [T.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
        want = torch.tensor(want, dtype=torch.float64)
        got = torch.stack(box, 1).to(torch.float64)
        for column in range(4):
            a, b = got[:, column], want[:, column]
            assert abs(a.mean() - b.mean()) < 4 * b.std() / math.sqrt(4000) * math.sqrt(1.2)
            assert abs(a.std() / b.std() - 1) < 0.05
        area = (box.height * box.width).double()
        assert (box.height < 32).all() and (box.width < 32).all() and (box.height * box.width > 0).all()
        assert abs(area.mean() - (want[:, 2] * want[:, 3]).mean()) < 4 * area.std() / math.sqrt(4000) * 1.1
        assert (box.top >= 0).all() and (box.left >= 0).all()
        assert (box.top + box.height).max() == 32 and (box.left + box.width).max() == 32

    def test_erasing_probability(self):
        box = augment.sample_erasing(self.n, 32, 32, 0.1, seeded())
        erased = box.height > 0
        assert torch.equal(erased, box.width > 0)
        assert abs(erased.float().mean() - 0.1) < self.tolerance * 0.3
        assert not augment.sample_erasing(self.n, 32, 32, 0.0, seeded()).height.any()

    def test_erasing_that_never_fits(self):
        assert not augment.sample_erasing(100, 1, 1, 1.0, seeded()).height.any()


class TestCutout:
    @pytest.mark.parametrize(("height", "width"), SIZES)
    @pytest.mark.parametrize("size", [1, 4, 16])
    def test_hole(self, height, width, size):
        """As in the authors' code, but that an odd size is that odd size."""
        n = 60
        row, column = augment.sample_pixel(n, height, width, seeded())
        got = augment.inside(augment.sample_cutout(n, height, width, size, seeded()), height, width, CPU)
        for i, (y, x) in enumerate(zip(row.tolist(), column.tolist(), strict=True)):
            want = torch.zeros(height, width, dtype=torch.bool)
            top, left = y - size // 2, x - size // 2
            want[max(top, 0) : top + size, max(left, 0) : left + size] = True
            assert torch.equal(got[i, 0], want) and want[y, x]

    def test_the_centre_is_uniform(self):
        n, height, width = 40_000, 8, 5
        box = augment.sample_cutout(n, height, width, 4, seeded())
        counts = ((box.top + 2) * width + box.left + 2).bincount(minlength=height * width)
        mean = n / (height * width)
        assert len(counts) == height * width and (counts - mean).abs().max() < 4.5 * math.sqrt(mean)

    def test_share_of_erased_pixels(self):
        """Against all centres one by one: 32 pixels, of a hole of 16 on average 14 in each direction."""
        n, side = 1500, 32
        within = sum(min(c + 8, side) - max(c - 8, 0) for c in range(side)) / side
        assert within == 14
        images = torch.full((n, 3, side, side), 200, dtype=torch.uint8)
        got = Augment(MEAN, STD, **dict.fromkeys(OPTIONS, 0), cutout=16)(images, seeded()) == 0
        share = got.flatten(1).double().mean(1)
        assert abs(share.mean() - (within / side) ** 2) < 4.5 * share.std() / math.sqrt(n)
        assert share.max() == 0.25 and share.min() == (8 / side) ** 2
        assert torch.equal(got, got[:, :1].expand_as(got))

    def test_rest_is_kept(self):
        images = random_images(20)
        plain, cut = Augment(MEAN, STD), Augment(MEAN, STD, cutout=6)
        want, got = plain(images, seeded()), cut(images, seeded())
        assert ((got == want) | (got == 0)).all() and (got != want).flatten(1).any(1).all()


def test_a_policy_comes_after_moving_and_before_colours():
    seen = []

    def policy(images, generator):
        seen.append(images.clone())
        return torch.rand(images.shape, generator=generator).mul(255).to(torch.uint8)

    options, images = dict.fromkeys(OPTIONS, 0) | {"crop_padding": 4, "flip": 0.5}, random_images(6)
    moved = Augment((0, 0, 0), (1, 1, 1), **options)(images, seeded()).mul(255).round().to(torch.uint8)
    got = Augment(MEAN, STD, **options, policy=policy)(images, seeded())
    assert torch.equal(seen[0], moved)
    generator = seeded()
    augment.sample_crop(6, 4, generator), augment.sample_flip(6, 0.5, generator)
    augment.sample_angle(6, 0, generator)
    want = augment.normalize(policy(images, generator), MEAN, STD)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


class TestAugment:
    def test_composition_equals_torchvision(self):
        """The recipe's order, with the parameters that the samplers give from the same seed."""
        n = 24
        images = random_images(n)
        got = Augment(MEAN, STD, erasing=0.5)(images, seeded(7))
        generator = seeded(7)
        top, left = augment.sample_crop(n, 4, generator)
        flip = augment.sample_flip(n, 0.5, generator)
        angle = augment.sample_angle(n, 15, generator)
        jitter = augment.sample_jitter(n, 0.2, 0.2, 0.2, 0.1, generator)
        box = augment.sample_erasing(n, 32, 32, 0.5, generator)
        theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        # Rotation is compared with PIL above; its borderline pixels would move the contrast's mean here.
        moved = augment.crop_flip_rotate(images, top, left, flip, angle, 4)
        for i in range(n):
            want = F.to_dtype(moved[i], torch.float32, scale=True)
            for operation in jitter.order[i].tolist():
                want = theirs[operation](want, jitter.factors[i, operation].item())
            want = F.normalize(want, MEAN, STD)
            want = F.erase(want, *(int(v[i]) for v in box), v=torch.zeros(1, 1, 1))
            torch.testing.assert_close(got[i], want, rtol=0, atol=5e-5)
        assert 0 < (box.height > 0).sum() < n and 0 < flip.sum() < n

    def test_statistics_equal_the_pil_recipe(self):
        """Mean and spread, over many draws, of each pixel's value for one picture."""
        y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        image = torch.stack([7 * y, 4 * x + 60, 5 * (31 - y) + 40]).to(torch.uint8)
        recipe = T.Compose(
            [
                T.RandomCrop(32, padding=4),
                T.RandomHorizontalFlip(),
                T.RandomRotation(15),
                T.ColorJitter(0.2, 0.2, 0.2, 0.1),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
                T.RandomErasing(p=0.1),
            ]
        )
        torch.manual_seed(0)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        want = torch.stack([recipe(picture) for _ in range(1500)])
        got = Augment(MEAN, STD)(image.expand(6000, -1, -1, -1), seeded())
        difference = (got.mean(0) - want.mean(0)).abs()
        deviation = want.std(0) * math.sqrt(1 / 1500 + 1 / 6000)
        # PIL rounds down after each colour operation: 0.016 darker, measured over 8000 draws.
        assert (difference < 0.03 + 4.5 * deviation).all()
        assert difference.mean() < 0.05
        assert abs((got.std(0) / want.std(0)).mean() - 1) < 0.03
        assert abs((got == 0).float().mean() - (want == 0).float().mean()) < 0.01

    def test_output(self):
        images = random_images(6, 17, 24)
        before = images.clone()
        got = Augment(MEAN, STD)(images, seeded())
        assert got.shape == images.shape and got.dtype == torch.float32 and got.is_contiguous()
        assert torch.equal(images, before)

    def test_samples_of_a_batch_get_different_parameters(self):
        got = Augment(MEAN, STD)(random_images(1).expand(16, -1, -1, -1), seeded())
        assert len(got.flatten(1).unique(dim=0)) == 16

    @pytest.mark.parametrize("option", OPTIONS)
    def test_each_transform_alone_varies_over_the_batch(self, option):
        options = dict.fromkeys(OPTIONS, 0) | {option: {"crop_padding": 4, "degrees": 15}.get(option, 0.5)}
        images = random_images(1).expand(32, -1, -1, -1)
        got = Augment(MEAN, STD, **options)(images, seeded())
        assert len(got.flatten(1).unique(dim=0)) > 1

    def test_nothing_but_normalisation(self):
        images = random_images(5)
        got = Augment(MEAN, STD, **dict.fromkeys(OPTIONS, 0))(images, seeded())
        torch.testing.assert_close(got, augment.normalize(images, MEAN, STD), rtol=0, atol=1e-6)

    def test_deterministic_from_the_generator(self):
        images, transform = random_images(8), Augment(MEAN, STD)
        generator = seeded(3)
        first, second = transform(images, generator), transform(images, generator)
        assert torch.equal(first, transform(images, seeded(3)))
        assert not torch.equal(first, second)

    def test_generator_alone_or_the_default_one(self):
        images, transform = random_images(4), Augment(MEAN, STD)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        transform(images, seeded())
        assert torch.equal(torch.get_rng_state(), state)
        first = transform(images)
        torch.manual_seed(0)
        assert torch.equal(transform(images), first)

    @pytest.mark.parametrize("batch", [0, 1, 2])
    def test_small_batches(self, batch):
        got = Augment(MEAN, STD, erasing=1.0)(random_images(batch), seeded())
        assert got.shape == (batch, 3, 32, 32) and got.isfinite().all()

    def test_non_contiguous_images(self):
        images = random_images(4)
        other = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        transform = Augment(MEAN, STD)
        assert torch.equal(transform(other, seeded()), transform(images, seeded()))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_on_a_gpu(self):
        images, transform = random_images(64), Augment(MEAN, STD)
        got = transform(images.cuda(), seeded())
        assert got.is_cuda
        # cos and sin may differ in the last bit, which moves borderline pixels of the rotation.
        close = (got.cpu() - transform(images, seeded())).abs() < 1e-3
        assert close.float().mean() > 0.99
        on_device = torch.Generator("cuda").manual_seed(0)
        assert transform(images.cuda(), on_device).isfinite().all()

    def test_bad_images(self):
        transform = Augment(MEAN, STD)
        with pytest.raises(TypeError, match="uint8 tensor, got torch.float32"):
            transform(torch.zeros(1, 3, 8, 8))
        with pytest.raises(TypeError, match="ndarray"):
            transform(np.zeros((1, 3, 8, 8), np.uint8))
        for shape in [(3, 8, 8), (2, 1, 8, 8), (2, 8, 8, 3)]:
            with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
                transform(torch.zeros(shape, dtype=torch.uint8))

    def test_grey_images(self):
        x = random_images(4)[:, :1]
        options = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "erasing"), 0)
        shifted = Augment((0.1,), (0.3,), crop_padding=1, flip=0, degrees=0, **options)(x, seeded())
        assert shifted.shape == x.shape and shifted.dtype == torch.float32
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        for image, made in zip(padded, (shifted * 0.3 + 0.1).mul(255).round().to(torch.uint8), strict=True):
            crops = image.unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2).movedim(1, 0)
            assert (crops == made).flatten(1).all(1).any()
        with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
            Augment((0.1,), (0.3,), **options)(random_images(2), seeded())
        with pytest.raises(ValueError, match="hue need 3 channels, got 1"):
            Augment((0.1,), (0.3,))

    @pytest.mark.parametrize(
        "options",
        [
            {"mean": (0.5,)},
            {"std": (0.2, 0.0, 0.2)},
            {"crop_padding": -1},
            {"crop_padding": 0.5},
            {"flip": 1.1},
            {"degrees": -1},
            {"brightness": -0.1},
            {"contrast": float("nan")},
            {"saturation": -1},
            {"hue": 0.6},
            {"erasing": -0.1},
            {"cutout": -1},
            {"cutout": 1.5},
        ],
    )
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Augment(**{"mean": MEAN, "std": STD} | options)
