"""Options that name layers: which are generated, from which epoch on, from embeddings of which size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def parse_layers(text: str, layers: Sequence[str]) -> tuple[str, ...]:
    """ "conv2,fc1", "all" or "none" -> names of `layers`, in their order. Raises ValueError."""
    if text in ("all", "none"):
        return tuple(layers) if text == "all" else ()
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(
            f"--generate: no layer {unknown[0]!r}; the layers are {', '.join(layers)} (or: all, none)"
        )
    return tuple(name for name in layers if name in names)


def parse_sizes(text: str, layers: Sequence[str], default: int) -> dict[str, int]:
    """ "16" or "conv5=8,fc1=32" or "16,conv5=8" -> size for each of `layers`. Raises ValueError."""
    sizes = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        if not number.strip().isdecimal() or int(number) < 1:
            raise ValueError(f"--z-dim: {part!r} is not a size or LAYER=SIZE, a size being at least 1")
        if not equals:
            default = int(number)
        elif name.strip() in layers:
            sizes[name.strip()] = int(number)
        else:
            raise ValueError(f"--z-dim: {_unknown(name.strip(), layers)}")
    return {name: sizes.get(name, default) for name in layers}


def parse_stages(texts: Sequence[str], layers: Sequence[str], epochs: int) -> dict[str, int]:
    """["conv4,conv5@10", "fc1@20"] -> for each of `layers` the number of epochs before it is generated.

    Raises ValueError.
    """
    starts = dict.fromkeys(layers, 0)
    seen: set[str] = set()
    for text in texts:
        names, _, epoch = text.rpartition("@")
        if not names or not epoch.isdecimal():
            raise ValueError(f"--progressive: {text!r} is not LAYERS@EPOCHS, as in conv4,conv5@10")
        if int(epoch) >= epochs:
            raise ValueError(f"--progressive {text}: the run has {epochs} epochs only")
        for name in (name.strip() for name in names.split(",")):
            if name not in layers:
                raise ValueError(f"--progressive: {_unknown(name, layers)}")
            if name in seen:
                raise ValueError(f"--progressive: {name} is named twice")
            seen.add(name)
            starts[name] = int(epoch)
    return starts


def describe(generated_from: Mapping[str, int], z_dims: Mapping[str, int]) -> dict[str, str]:
    """The three options as they were given, layers in the network's order, for the recipe of a run."""
    epochs = sorted({epoch for epoch in generated_from.values() if epoch})
    stages = [f"{','.join(n for n, start in generated_from.items() if start == e)}@{e}" for e in epochs]
    sizes = sorted(set(z_dims.values()))
    by_name = ",".join(f"{name}={size}" for name, size in z_dims.items())
    return {
        "generate": ",".join(generated_from) or "none",
        "z_dim": by_name if len(sizes) > 1 else "".join(map(str, sizes)) or "none",
        "progressive": " ".join(stages) or "none",
    }


def _unknown(name: str, layers: Sequence[str]) -> str:
    return f"no generated layer {name!r}; there are {', '.join(layers) or 'none'}"
