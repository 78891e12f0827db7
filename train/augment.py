"""Batched image augmentation with fresh parameters for every sample.

Statistically the same as this torchvision recipe applied to one PIL image at a time, at a few milliseconds
for a batch of 64 CIFAR images on two cores:

    RandomCrop(size, padding) -> RandomHorizontalFlip -> RandomRotation (nearest, zero fill) -> a policy, such
    as AutoAugment -> ColorJitter (its four operations in a random order for each sample) -> ToTensor ->
    Normalize -> RandomErasing -> Cutout

Each transform is a function of explicit per-sample parameters, and has a sampler that draws them. `Augment`
composes them. Colours are computed on floats in [0, 1], as torchvision does for tensors; PIL rounds to 8
bits in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, torchvision's digits
# Options of `Augment` that leave crop and flip alone
CROP_FLIP = dict.fromkeys(("degrees", "brightness", "contrast", "saturation", "hue", "erasing"), 0)
Policy = Callable[[Tensor, torch.Generator | None], Tensor]  # uint8 [B, C, H, W] -> the same, in new memory


class Jitter(NamedTuple):
    """Parameters of `color_jitter_`.

    order: int64 [B, 4], for each sample a permutation of the operations 0 brightness, 1 contrast,
    2 saturation, 3 hue. factors: float32 [B, 4], one column for each operation.
    """

    order: Tensor
    factors: Tensor


class Box(NamedTuple):
    """Rectangles, int64 [B] each, in pixels; they may reach over an image's border, height 0 is empty."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


# ---- transforms, explicit parameters ----


def crop_flip_rotate(
    images: Tensor, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor, padding: int
) -> Tensor:
    """Pad with zeros, crop back to H x W, flip, then rotate, as one nearest-neighbour gather.

    images: [B, C, H, W], any dtype. top, left: int64 [B], corner of the crop in the padded image, 0 to
    2 * padding. flip: bool [B]. angle: float [B], degrees, counter-clockwise about the centre. Returns a new
    tensor of the shape and dtype of images. What the rotation reads from outside the crop is zero, even
    where the image goes on.
    """
    batch, channels, height, width = images.shape
    device = images.device
    top, left, flip, angle = (v.to(device).view(batch, 1, 1) for v in (top, left, flip, angle))
    x = torch.arange(width, device=device, dtype=torch.float32) + (0.5 - width / 2)
    y = (torch.arange(height, device=device, dtype=torch.float32) + (0.5 - height / 2)).unsqueeze(1)
    theta = angle.to(torch.float32) * (math.pi / 180)
    cos, sin = theta.cos(), theta.sin()
    # The pixel of the crop that holds the point, as PIL rounds.
    row = (sin * x + cos * y).add_(height / 2).floor_()
    column = (cos * x - sin * y).add_(width / 2).floor_()
    beyond_crop = _beyond(row, column, height, width)
    # From the crop to the image; a flip is column -> width - 1 - column.
    row.add_(top - padding)
    column.mul_(1 - 2.0 * flip).add_(left - padding + (width - 1) * flip)
    inside = torch.maximum(beyond_crop, _beyond(row, column, height, width)) <= 0
    index = row.clamp_(0, height - 1).mul_(width).add_(column.clamp_(0, width - 1)).to(torch.int64)
    index = index.view(batch, 1, height * width).expand(-1, channels, -1)
    pixels = images.flatten(2).gather(2, index).view_as(images)
    return pixels.mul_(inside.view(torch.uint8).unsqueeze(1))


def _beyond(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Pixels by which a position lies outside a height x width image, not positive inside."""
    vertical = (row - (height - 1) / 2).abs_().sub_((height - 1) / 2)
    horizontal = (column - (width - 1) / 2).abs_().sub_((width - 1) / 2)
    return torch.maximum(vertical, horizontal)


def grayscale(images: Tensor) -> Tensor:
    """Luma of float [B, 3, H, W] as [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2]).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """images: float [B, 3, H, W] in [0, 1]; factor: float [B] >= 0, 1 keeps the image. Gives a new tensor."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the image's luma. Arguments as `adjust_brightness`."""
    return _blend(images, grayscale(images).flatten(1).mean(1).view(-1, 1, 1, 1), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma. Arguments as `adjust_brightness`."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue. images: float [B, 3, H, W] in [0, 1]; shift: float [B], -0.5 to 0.5 turns.

    With v = max, m = min, c = v - m, the hue is h = sign(g - b) (v - r + g + b - 2m) / c, in sixths of a
    turn from -3 to 3: the usual three cases in one. Back, a channel is v + c * clamp(d, -1, 0) with
    d = |h - 3| - 2 for red, 1 - |h - 2| for green and 1 - |h - 4| for blue, h in [0, 6).
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    minimum = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - minimum
    hue = (value - red).add_(green).add_(blue).sub_(minimum, alpha=2)
    hue = hue.div_(chroma.clamp_min(1e-12)).copysign_(green - blue)
    hue = hue.add_(6 * shift.view(-1, 1, 1)).remainder_(6)
    out = torch.empty_like(images)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -2), (2, -1, 1), (4, -1, 1))):
        weight = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(-1, 0)
        torch.mul(chroma, weight, out=weight)
        torch.add(value, weight, out=out[:, channel])
    return out


def color_jitter_(images: Tensor, jitter: Jitter) -> Tensor:
    """Apply the four colour adjustments to every sample in its own order, in place.

    images: float [B, 3, H, W] in [0, 1]. Returns images. On a GPU the host waits once, for the sizes of the
    groups of samples that have an operation at the same position.
    """
    samples = jitter.order.argsort(dim=0, stable=True)  # by operation, in each column
    operations = torch.arange(len(ADJUSTMENTS), device=samples.device)
    sizes = (jitter.order.unsqueeze(2) == operations).sum(0).tolist()
    for position in range(4):
        groups = samples[:, position].split(sizes[position])
        for operation, (adjust, chosen) in enumerate(zip(ADJUSTMENTS, groups, strict=True)):
            if len(chosen):
                factor = jitter.factors[chosen, operation].to(images.device)
                chosen = chosen.to(images.device)
                images.index_copy_(0, chosen, adjust(images.index_select(0, chosen), factor))
    return images


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel. images: [B, C, H, W], uint8 (divided by 255 first) or float.

    Returns a new float32 [B, C, H, W]. Raises TypeError for another dtype, ValueError for a wrong shape or
    number of channels.
    """
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"images must be a uint8 or float tensor, got {_describe(images)}")
    if images.ndim != 4 or not images.shape[1] == len(mean) == len(std):
        wanted = f"[B, C, H, W] with C = {len(mean)} means = {len(std)} stds"
        raise ValueError(f"images must be {wanted}, got {_describe(images)}")
    floats = images.to(torch.float32, copy=True)
    return _normalize_(floats.div_(255) if images.dtype == torch.uint8 else floats, mean, std)


def _normalize_(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (_per_channel(tuple(v), images.device) for v in (mean, std))
    return images.sub_(shift).div_(scale)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1], made once: a copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def erase_(images: Tensor, box: Box) -> Tensor:
    """Set one rectangle of each sample to zero, in place. images: [B, C, H, W], any dtype. Returns images."""
    return images.masked_fill_(inside(box, *images.shape[2:], images.device), 0)


def inside(box: Box, height: int, width: int, device: torch.device) -> Tensor:
    """Whether a pixel is in the rectangle of its sample: bool [B, 1, H, W]."""
    top, left, box_height, box_width = (v.to(device).view(-1, 1, 1, 1) for v in box)
    y = torch.arange(height, device=device).view(1, 1, -1, 1)
    x = torch.arange(width, device=device)
    return (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # by operation number


# ---- samplers: n samples' parameters, on the generator's device (CPU without one) ----


def device_of(generator: torch.Generator | None) -> torch.device:
    """Where it draws; None is torch's default one."""
    return torch.device("cpu") if generator is None else generator.device


def _uniform(
    shape: tuple[int, ...],
    low: float,
    high: float,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    empty = torch.empty(shape, dtype=dtype, device=device_of(generator))
    return empty.uniform_(low, high, generator=generator)


def sample_crop(n: int, padding: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """top and left, int64 [n] each, uniform on 0..2 * padding."""
    device = device_of(generator)
    corner = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device)
    return corner[0], corner[1]


def sample_flip(n: int, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """bool [n], True with the given probability."""
    return _uniform((n,), 0, 1, generator) < probability


def sample_angle(n: int, degrees: float, generator: torch.Generator | None = None) -> Tensor:
    """float32 [n], uniform on [-degrees, degrees]."""
    return _uniform((n,), -degrees, degrees, generator)


def sample_jitter(
    n: int,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    generator: torch.Generator | None = None,
) -> Jitter:
    """Factors uniform on [max(0, 1 - x), 1 + x], hue on [-hue, hue] turns, all 24 orders equally likely."""
    order = _uniform((n, 4), 0, 1, generator, torch.float64).argsort(1)
    factors = [_uniform((n,), max(0, 1 - x), 1 + x, generator) for x in (brightness, contrast, saturation)]
    return Jitter(order, torch.stack([*factors, _uniform((n,), -hue, hue, generator)], 1))


def sample_erasing(
    n: int, height: int, width: int, probability: float, generator: torch.Generator | None = None
) -> Box:
    """Boxes of torchvision's RandomErasing in a height x width image, with its default scale and ratio.

    Area uniform on 2 to 33 % of the image, aspect ratio log-uniform on 0.3 to 3.3; up to ten tries for a box
    smaller than the image in both directions, uniform place. Height 0 where nothing is erased.
    """
    tries = 10
    area = _uniform((n, tries), 0.02, 0.33, generator, torch.float64) * (height * width)
    ratio = _uniform((n, tries), math.log(0.3), math.log(3.3), generator, torch.float64).exp_()
    heights, widths = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (heights < height) & (widths < width)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    box_height, box_width = heights.gather(1, first).squeeze(1), widths.gather(1, first).squeeze(1)
    erased = (_uniform((n,), 0, 1, generator) < probability) & fits.any(1)
    corner = _uniform((2, n), 0, 1, generator, torch.float64)
    top = (corner[0] * (height - box_height + 1)).floor_().minimum(height - box_height)
    left = (corner[1] * (width - box_width + 1)).floor_().minimum(width - box_width)
    return Box(*((v * erased).to(torch.int64) for v in (top, left, box_height, box_width)))


def sample_cutout(
    n: int, height: int, width: int, size: int, generator: torch.Generator | None = None
) -> Box:
    """Holes of size x size pixels with their centre uniform over a height x width image, as in the authors'
    code: a hole at the border is cut there. DeVries and Taylor, "Improved Regularization of Convolutional
    Neural Networks with Cutout" (2017)."""
    row, column = sample_pixel(n, height, width, generator)
    side = torch.full_like(row, size)
    return Box(row - size // 2, column - size // 2, side, side)


def sample_pixel(
    n: int, height: int, width: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [n] each, uniform over a height x width image."""
    device = device_of(generator)
    row = torch.randint(height, (n,), generator=generator, device=device)
    return row, torch.randint(width, (n,), generator=generator, device=device)


class Augment:
    """The recipe at the top of this file for batches of images.

    mean, std: a value for each of the C channels, of pixels in [0, 1]; colours are jittered on RGB images
    alone. crop_padding in pixels, degrees of rotation, flip and
    erasing probabilities, brightness, contrast, saturation and hue as torchvision's ColorJitter. policy:
    applied to the images once they are moved. cutout: side of the hole in pixels, 0 for none; it is zero
    after normalising. Raises ValueError for values out of range.

    Calling it with images uint8 [B, C, H, W] and a torch.Generator (None: torch's default one) gives
    normalised float32 [B, C, H, W] on the images' device, images unchanged; what is drawn depends on the
    generator's state alone. Raises TypeError for images that are not a uint8 tensor, ValueError for another
    shape.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 4,
        flip: float = 0.5,
        degrees: float = 15,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.1,
        erasing: float = 0.1,
        policy: Policy | None = None,
        cutout: int = 0,
    ) -> None:
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"mean and std must have a value for each channel, std positive, got {mean} and {std}"
            )
        for name, pixels in (("crop_padding", crop_padding), ("cutout", cutout)):
            if not isinstance(pixels, int) or pixels < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {pixels}")
        limits = {"flip": (flip, 1), "erasing": (erasing, 1), "degrees": (degrees, 180), "hue": (hue, 0.5)}
        limits |= {"brightness": (brightness, math.inf), "contrast": (contrast, math.inf)}
        limits |= {"saturation": (saturation, math.inf)}
        for name, (value, limit) in limits.items():
            if not 0 <= value <= limit:
                raise ValueError(f"{name} must be between 0 and {limit}, got {value}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_padding, self.flip, self.degrees, self.erasing = crop_padding, flip, degrees, erasing
        self.policy, self.cutout = policy, cutout
        self.jitter = (brightness, contrast, saturation, hue)
        if any(self.jitter) and len(mean) != 3:
            raise ValueError(f"brightness, contrast, saturation and hue need 3 channels, got {len(mean)}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise TypeError(f"images must be a uint8 tensor, got {_describe(images)}")
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(f"images must be [B, {len(self.mean)}, H, W], got {_describe(images)}")
        n, _, height, width = images.shape
        top, left = sample_crop(n, self.crop_padding, generator)
        flip = sample_flip(n, self.flip, generator)
        angle = sample_angle(n, self.degrees, generator)
        images = crop_flip_rotate(images, top, left, flip, angle, self.crop_padding)
        if self.policy is not None:
            images = self.policy(images, generator)
        colors = images.to(torch.float32).div_(255)
        if any(self.jitter):
            color_jitter_(colors, sample_jitter(n, *self.jitter, generator))
        _normalize_(colors, self.mean, self.std)
        if self.erasing:
            erase_(colors, sample_erasing(n, height, width, self.erasing, generator))
        if self.cutout:
            erase_(colors, sample_cutout(n, height, width, self.cutout, generator))
        return colors


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
