"""Augmentations of CIFAR-10 by name, AutoAugment and CutMix for batches.

`AUGMENTATIONS[name](mean, std)(images, generator)`: uint8 [B, 3, H, W] -> normalised float32, each image with
draws of its own. All but "none" crop and flip as well. `MIXES[name](num_classes)`, where there is one of that
name, is the `mix` of `ImageData` that goes with it. What is drawn depends on the generator's state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from train.augment import CROP_FLIP, Augment, Box, device_of, inside, normalize, sample_pixel

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
HOLE = 16  # of Cutout on CIFAR-10
NOTHING = ("Identity", 0.0)


class Draws(NamedTuple):
    """What AutoAugment draws for B images: the policy, int64 [B], and for each of its two operations numbers
    uniform on 0 to 1, float32 [B, 2], of which low ones use it and take the magnitude's negative."""

    policy: Tensor
    use: Tensor
    sign: Tensor


class Table(NamedTuple):
    """The operations of all policies for one size of images.

    operations: each (name, magnitude) once; the first is none. index: int64 [policies, 2, 2], into them, by
    policy, place and whether the sign is negative. probability: float32 [policies, 2] of using it.
    """

    operations: tuple[tuple[str, float], ...]
    index: Tensor
    probability: Tensor


class AutoAugment:
    """The CIFAR-10 policy of Cubuk et al., "AutoAugment" (CVPR 2019), with torchvision's operations.

    images uint8 [B, 3, H, W] -> the same in new memory. Each image has its own draws; images with the same
    operation at the same magnitude go through torchvision together, and come out as from torchvision's
    AutoAugment of one image after the other. On a GPU the host waits for the sizes of these groups and for
    small copies in some operations: it is made for many images at once.
    """

    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, n: int, generator: torch.Generator | None = None) -> Draws:
        device = device_of(generator)
        policy = torch.randint(len(self.theirs._policies), (n,), generator=generator, device=device)
        use, sign = torch.rand(2, n, 2, generator=generator, device=device)
        return Draws(policy, use, sign)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """The policies' operations, first and second one of all images."""
        policy, use, sign = (v.to(images.device) for v in draws)
        table = self.table(*images.shape[2:], images.device)
        chosen = table.index[policy].gather(2, (sign <= 0.5).long().unsqueeze(2)).squeeze(2)
        chosen = chosen * (use <= table.probability[policy])
        order = chosen.argsort(dim=0, stable=True)
        known = torch.arange(len(table.operations), device=images.device)
        sizes = (chosen.unsqueeze(2) == known).sum(0).tolist()
        images = images.clone()
        for place in range(2):
            groups = order[:, place].split(sizes[place])
            for operation, group in zip(table.operations, groups, strict=True):
                if len(group) and operation != NOTHING:
                    images.index_copy_(0, group, self._operate(images.index_select(0, group), *operation))
        return images

    def _operate(self, images: Tensor, name: str, magnitude: float) -> Tensor:
        nearest, fill = self.theirs.interpolation, self.theirs._fill
        return self.theirs._apply_image_or_video_transform(images, name, magnitude, nearest, fill)

    @staticmethod
    @lru_cache
    def table(height: int, width: int, device: torch.device) -> Table:
        theirs, operations = AutoAugment.theirs, {NOTHING: 0}
        index = []
        for policy in theirs._policies:
            for name, _, level in policy:
                magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
                values = magnitudes(10, height, width)
                magnitude = 0.0 if values is None else float(values[level])
                both = ((name, magnitude), (name, -magnitude if signed else magnitude))
                index.append([operations.setdefault(one, len(operations)) for one in both])
        probability = torch.tensor([[p for _, p, _ in policy] for policy in theirs._policies])
        index = torch.tensor(index).view(-1, 2, 2)
        return Table(tuple(operations), index.to(device), probability.to(device))


class CutMix:
    """Yun et al., "CutMix" (ICCV 2019), alpha 1: a box of each image is filled from the one before it in the
    batch (which is in random order), whose class gets the box's share of the target.

    The images of a batch have one box: lambda uniform on 0 to 1 (Beta(1, 1)), centre uniform over the image,
    sides those of the image times sqrt(1 - lambda) (equation 2), cut at the border; the shares are those of
    the true area. Every batch is mixed; the authors' code mixes each with probability 0.5 on CIFAR. The same
    as `torchvision.transforms.v2.CutMix`, for many batches at once.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(
        self, images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """images [n, C, H, W], labels int64 [n], n a multiple of batch_size -> mixed images, and targets
        float32 [n, num_classes]. Raises ValueError for another n."""
        n, _, height, width = images.shape
        if n % batch_size:
            raise ValueError(f"images must be whole batches of {batch_size}, got {n}")
        return self.apply(images, labels, sample_mix(n // batch_size, height, width, generator))

    def apply(self, images: Tensor, labels: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """The same with the box of each batch."""
        height, width = images.shape[2:]
        batches = len(box.top)
        images, labels = (v.unflatten(0, (batches, len(v) // max(batches, 1))) for v in (images, labels))
        within = inside(box, height, width, images.device).unsqueeze(1)
        mixed = torch.where(within, images.roll(1, 1), images).flatten(0, 1)
        other = (box.height * box.width).to(images.device).view(-1, 1, 1) / (height * width)
        own = (labels.unsqueeze(2) == torch.arange(self.num_classes, device=labels.device)).float()
        return mixed, torch.lerp(own, own.roll(1, 1), other).flatten(0, 1)


def sample_mix(n: int, height: int, width: int, generator: torch.Generator | None = None) -> Box:
    """Boxes of CutMix within a height x width image."""
    row, column = sample_pixel(n, height, width, generator)
    device = row.device
    ratio = torch.rand(n, generator=generator, dtype=torch.float64, device=device).neg_().add_(1).sqrt_()
    tall, wide = ((ratio * side / 2).long() for side in (height, width))  # half of the sides
    top, left = (row - tall).clamp_min(0), (column - wide).clamp_min(0)
    return Box(top, left, (row + tall).clamp_max(height) - top, (column + wide).clamp_max(width) - left)


def _plain(mean: Sequence[float], std: Sequence[float]) -> Augmentation:
    return lambda images, generator: normalize(images, mean, std)


AUGMENTATIONS: dict[str, Callable[[Sequence[float], Sequence[float]], Augmentation]] = {
    "none": _plain,
    "crop_flip": partial(Augment, **CROP_FLIP),
    "cutout": partial(Augment, **CROP_FLIP, cutout=HOLE),
    "autoaugment": partial(Augment, **CROP_FLIP, policy=AutoAugment()),
    "cutmix": partial(Augment, **CROP_FLIP),
    "jitter": partial(Augment, degrees=0, erasing=0),
    "rotation": partial(Augment, **CROP_FLIP | {"degrees": 15}),
}
MIXES: dict[str, Callable[[int], CutMix]] = {"cutmix": CutMix}
