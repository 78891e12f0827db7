"""Checkpoints that survive a crash at any moment and are checked before they are trusted.

A file is written under a temporary name in the same folder, flushed to the disk and renamed over the old
one: a reader sees the old file or the new one, never a part of one. The payload is a dict of tensors and
plain Python values, so that `torch.load(path, weights_only=True)` reads it. torch stores check sums and
does not verify them; `load` does.
"""

from __future__ import annotations

import copy
import errno
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from hyperfast.factored import whole_shape

FORMAT = "hyperfast-checkpoint"
VERSION = 1
CAPABILITIES = ("capturable", "fused", "foreach")  # of a group of torch's optimizers


class CheckpointError(ValueError):
    """A file could not be written, read, or does not fit: one line that names the file and the reason."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; on any failure `path` stays as it was.

    Raises CheckpointError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not saved, {_reason(error)}; an earlier file is unchanged") from error


def save(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` (tensors and plain values, string keys) atomically, tensors as on the CPU. Raises
    CheckpointError."""
    content = {"format": FORMAT, "version": VERSION, **_on_cpu(payload)}
    write_atomically(path, lambda file: torch.save(content, file))


def _on_cpu(value: Any) -> Any:
    """`value` with its tensors on the CPU; those that are there stay the same."""
    if torch.is_tensor(value):
        return value.cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes
        copied.update((key, _on_cpu(item)) for key, item in value.items())
        return copied
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def load(path: str | Path, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises CheckpointError for a missing, truncated or altered file, a file of another program or format
    version, and a payload without one of the `required` keys.
    """
    try:
        with open(path, "rb") as file:
            content = _read(file, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror or error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    if content["version"] != VERSION:
        raise CheckpointError(f"{path}: format version {content['version']}, this program reads {VERSION}")
    missing = [key for key in required if key not in content]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing, perhaps a file of another kind")
    return content


def _read(file: BinaryIO, path: str | Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True) if damaged is None else None
    except Exception as error:  # zipfile, zlib and pickle each raise their own on damaged input
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({one_line(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged file, check sum of {damaged} is wrong")
    return content


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a file of any kind: a checkpoint of this project, safetensors, or what `torch.save` made
    of a state dict or of a dict that holds one under "model_state_dict", "state_dict", "model" or "net".

    Raises CheckpointError for a file that cannot be read or holds no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        with open(path, "rb") as file:
            content = _read(file, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not safetensors ({one_line(error)})") from error
    for key in ("model_state_dict", "state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and content and all(map(torch.is_tensor, content.values()))):
        raise CheckpointError(f"{path}: holds no state dict")
    return dict(content)


def load_model(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load `state` into `model`; names or shapes that do not fit raise CheckpointError, `model` unchanged."""
    own = model.state_dict()
    faults = [f"{name} missing" for name in own if name not in state]
    faults += [f"{name} unexpected" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        raise CheckpointError(f"{path}: weights of another model: {_first(faults)}")
    model.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: str | Path) -> None:
    """`optimizer.load_state_dict(state)`; state that does not fit its parameters raises CheckpointError.

    How `optimizer` computes (CAPABILITIES of its groups) stays as it is, whatever device the state is from.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [tuple(whole_shape(p)) for p in parameters]
    faults = [
        f"{key} of parameter {i} has shape {tuple(value.shape)}, wanted {shapes[i]}"
        for i, values in state["state"].items()
        for key, value in values.items()
        if i < len(parameters)
        and torch.is_tensor(value)
        and value.dim()
        and not key.endswith("_scales")  # of 8-bit states; the optimizer knows their shape
        and value.shape != shapes[i]
    ]
    if faults:
        raise CheckpointError(f"{path}: optimizer state of another model: {_first(faults)}")
    own = [{key: group[key] for key in CAPABILITIES if key in group} for group in optimizer.param_groups]
    groups = [{**group, **ways} for group, ways in zip(state["param_groups"], own, strict=False)]
    try:
        optimizer.load_state_dict({**state, "param_groups": groups + state["param_groups"][len(own) :]})
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: optimizer state does not fit, {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _first(faults: list[str]) -> str:
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def _reason(error: BaseException) -> str:
    """torch.save hides the write error of the operating system behind one of its own: look for it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return "disk full" if cause.errno == errno.ENOSPC else (cause.strerror or str(cause))
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
