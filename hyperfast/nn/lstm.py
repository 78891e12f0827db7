"""The LSTM whose weights a smaller LSTM scales at every step (HyperLSTM), and the LSTM it is measured
against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hyperfast.ops._library import check_backend, check_dense
from hyperfast.ops.lstm import lstm
from hyperfast.reference import HyperCell, LSTMState, Norms, map_state

NORMS = ("gates_norm_weight", "gates_norm_bias", "cell_norm_weight", "cell_norm_bias")  # as in `Norms`
State = LSTMState | tuple[Tensor | None, ...]


def _check_size(name: str, size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
    return size


def _check_share(name: str, share: float, one_allowed: bool) -> float:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 <= share <= 1 or (share == 1 and not one_allowed):
        bounds = "from 0 to 1" if one_allowed else "from 0 to below 1"
        raise ValueError(f"{name} must be the share to drop, a number {bounds}, got {share!r}")
    return float(share)


def _check_input(input: Tensor, dims: Sequence[int], wanted: str, features: int) -> None:
    check_dense("input", input)
    if input.dim() not in dims:
        raise ValueError(f"input must be {wanted}, got shape {list(input.shape)}")
    if input.shape[-1] != features:
        raise ValueError(f"input must have input_size {features} as its last dimension, got shape "
                         f"{list(input.shape)}")  # fmt: skip


def _full_state(state: State | None, sizes: Sequence[int], lead: Sequence[int], like: Tensor) -> LSTMState:
    """`state` as [*lead, size] for each of `sizes`: h, c and, with four of them, hyper_h, hyper_c; zeros
    where it has none."""
    if state is not None and not isinstance(state, tuple | list):
        raise TypeError(f"state must be a tuple of tensors, got {type(state).__name__}")
    given = [] if state is None else list(state)
    fits = state is None or len(given) in (2, 4)
    if not fits or any(s is not None for s in given[len(sizes) :]):
        wanted = "(h, c)" if len(sizes) == 2 else "(h, c) or (h, c, hyper_h, hyper_c)"
        raise ValueError(f"state must be {wanted}, got {len(given)} tensors")
    if all(s is None for s in given[2:]):
        given = given[:2]
    for name, tensor, size in zip(LSTMState._fields, given, sizes, strict=False):
        check_dense(f"{name} of the state", tensor)
        if tuple(tensor.shape) != (*lead, size):
            raise ValueError(f"{name} of the state must be {[*lead, size]}, got {list(tensor.shape)}")
    return LSTMState(*given, *(like.new_zeros(*lead, size) for size in sizes[len(given) :]))


def _orthogonal_(weight: Tensor) -> None:
    """weight [4n, m]: orthonormal rows, or columns, in each gate."""
    for gate in weight.chunk(4):
        wide = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
        gate.copy_(nn.init.orthogonal_(wide))


def _lstm_shapes(inputs: int, n: int, layer_norm: bool) -> dict[str, tuple[int, ...]]:
    """Parameters of an LSTM of n units."""
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (4 * n, inputs), "weight_hh": (4 * n, n)}
    shapes["bias"] = (4 * n,)
    if layer_norm:
        shapes |= dict(zip(NORMS, [(4 * n,), (4 * n,), (n,), (n,)], strict=True))
    return shapes


class _Cell(nn.Module):
    """One layer: parameters of given shapes, and what is done with them."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    state_sizes: tuple[int, ...]  # of h and c, and of hyper_h and hyper_c

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        shapes: dict[str, tuple[int, ...]],
        layer_norm: bool,
        recurrent_dropout: float,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.layer_norm, self.backend = bool(layer_norm), check_backend(backend)
        self.recurrent_dropout = _check_share("recurrent_dropout", recurrent_dropout, one_allowed=False)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def _reset_lstm(self, prefix: str = "") -> None:
        """Orthogonal weights, norms without effect, biases 0 but the forget gate's: 1, in the bias of its
        norm where there is one, since a norm takes off what shifts a gate before it."""
        own = {name: p for name in ("weight_ih", "weight_hh", "bias", *NORMS)
               if (p := getattr(self, prefix + name, None)) is not None}  # fmt: skip
        _orthogonal_(own["weight_ih"])
        _orthogonal_(own["weight_hh"])
        for name, p in own.items():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        nn.init.ones_(own["gates_norm_bias" if self.layer_norm else "bias"].chunk(4)[1])

    def reset_parameters(self) -> None:
        self._reset_lstm()

    def _norms(self, prefix: str = "") -> Norms | None:
        return Norms(*(getattr(self, prefix + name) for name in NORMS)) if self.layer_norm else None

    def _hyper(self) -> HyperCell | None:
        """What scales the gates."""
        return None

    def _sequence(
        self, x: Tensor, state: LSTMState, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """h of every step [N, H] and the last state, for x [N, I], rows step by step as in
        `PackedSequence.data`, and its `batch_sizes`; None: every step has as many rows as the state."""
        if x.dtype != self.weight_ih.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"input must be {self.weight_ih.dtype} like the weights, got {x.dtype}")
        dropout = self.recurrent_dropout if self.training else 0.0
        key = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
        weights = self.weight_ih, self.weight_hh, self.bias, self._norms(), self._hyper()
        return lstm(x, state, *weights, batch_sizes, key, dropout, backend=self.backend)

    def _returned(self, state: LSTMState) -> State:
        """The state as callers get it."""
        return state if len(self.state_sizes) == 4 else (state.h, state.c)

    def forward(self, input: Tensor, state: State | None = None) -> State:
        _check_input(input, (1, 2), f"[B, {self.input_size}] or [{self.input_size}]", self.input_size)
        full = _full_state(state, self.state_sizes, input.shape[:-1], input)
        if input.dim() == 2:
            return self._returned(self._sequence(input, full)[1])
        _, last = self._sequence(input.unsqueeze(0), map_state(full, lambda s: s.unsqueeze(0)))
        return self._returned(map_state(last, lambda s: s.squeeze(0)))

    def extra_repr(self) -> str:
        options = {"layer_norm": self.layer_norm, "recurrent_dropout": self.recurrent_dropout}
        shown = [f"{name}={value}" for name, value in options.items() if value]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])


class LSTMCell(_Cell):
    """`nn.LSTMCell` with one bias and, if wanted, layer norm and recurrent dropout: input [B, I] or [I],
    state (h, c), each [B, H] or [H], or None (zeros) -> (h, c).

    weight_ih [4H, I], weight_hh [4H, H], bias [4H], gates in the order i, f, g, o. layer_norm: each gate is
    normalised before its activation, and the cell state where h is made of it (Ba, Kiros and Hinton, "Layer
    normalization", 2016): gates_norm_weight and _bias [4H], cell_norm_weight and _bias [H].
    recurrent_dropout: the share of candidates tanh(g) dropped in training, with a mask for every step
    (Semeniuta, Severyn and Barth, 2016). Weights start orthogonal in each gate, the forget gate's bias at 1.
    backend: "auto" runs fused kernels where there are any, "reference" plain PyTorch. ValueError or TypeError
    for sizes below 1, shares outside [0, 1), input or state of another shape or dtype.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        I, H = _check_size("input_size", input_size), _check_size("hidden_size", hidden_size)
        shapes = _lstm_shapes(I, H, layer_norm)
        super().__init__(I, H, shapes, layer_norm, recurrent_dropout, backend, device, dtype)
        self.state_sizes = (H, H)


class HyperLSTMCell(_Cell):
    """An LSTM cell whose gates a smaller LSTM scales and shifts at every step (Ha, Dai and Le,
    "HyperNetworks", ICLR 2017, section 3.3 and appendix A.2): input [B, I] or [I], state `LSTMState` or
    None (zeros) -> `LSTMState` of h and c, each [B, H] or [H], and hyper_h and hyper_c, [B, M] or [M].

        gates = d_x * (weight_ih x) + d_h * (weight_hh h) + d_b + bias

    where d_x, d_h and d_b come from the output of the hyper LSTM of `hyper_size` = M units, which reads x and
    h, by embeddings of `embedding_size` = Z numbers, one for each gate and place. A tuple (h, c) as state
    starts the hyper LSTM at zeros.

    Beside the parameters of `LSTMCell`, and with layer norm those of the hyper LSTM's norms by the same names
    after `hyper_`: hyper_weight_ih [4M, I + H], hyper_weight_hh [4M, M], hyper_bias [4M]; z_weight [12Z, M]
    and z_bias [8Z], the embeddings for the scales of x and of h and for the shift, which has no bias;
    d_weight [12, H, Z], from these to d_x, d_h and d_b.

    Initialisation as in the paper: as `LSTMCell`, and scales that start at 0.1, shifts at 0. layer_norm and
    recurrent_dropout, here of both LSTMs, backend and errors: see `LSTMCell`.
    """

    hyper_weight_ih: Tensor
    hyper_weight_hh: Tensor
    hyper_bias: Tensor
    z_weight: Tensor
    z_bias: Tensor
    d_weight: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 128,
        embedding_size: int = 16,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        I, H = _check_size("input_size", input_size), _check_size("hidden_size", hidden_size)
        M, Z = _check_size("hyper_size", hyper_size), _check_size("embedding_size", embedding_size)
        shapes = _lstm_shapes(I, H, layer_norm)
        shapes |= {f"hyper_{name}": shape for name, shape in _lstm_shapes(I + H, M, layer_norm).items()}
        shapes |= {"z_weight": (12 * Z, M), "z_bias": (8 * Z,), "d_weight": (12, H, Z)}
        super().__init__(I, H, shapes, layer_norm, recurrent_dropout, backend, device, dtype)
        self.hyper_size, self.embedding_size, self.state_sizes = M, Z, (H, H, M, M)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._reset_lstm()
        self._reset_lstm("hyper_")
        Z = self.d_weight.shape[2]
        nn.init.zeros_(self.z_weight[: 8 * Z])
        nn.init.normal_(self.z_weight[8 * Z :], std=0.01)
        nn.init.ones_(self.z_bias)
        nn.init.constant_(self.d_weight[:8], 0.1 / Z)
        nn.init.zeros_(self.d_weight[8:])

    def full_z_bias(self) -> Tensor:
        """z_bias of all embeddings [12Z]: those of the shift have none, so 0."""
        return F.pad(self.z_bias, (0, 4 * self.embedding_size))

    def _hyper(self) -> HyperCell:
        return HyperCell(
            self.hyper_weight_ih, self.hyper_weight_hh, self.hyper_bias, self.z_weight, self.full_z_bias(),
            self.d_weight, self._norms("hyper_"),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hyper_size={self.hyper_size}, embedding_size={self.embedding_size}"


class _Layers(nn.Module):
    """Cells one above the other, over sequences as `nn.LSTM` takes them."""

    def __init__(
        self,
        cell: Callable[[int], _Cell],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
    ):
        super().__init__()
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first must be True or False, got {batch_first!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.batch_first = _check_size("num_layers", num_layers), batch_first
        self.dropout = _check_share("dropout", dropout, one_allowed=True)
        if self.dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} is applied between layers, and there is one layer", stacklevel=3
            )
        self.layers = nn.ModuleList(cell(hidden_size if i else input_size) for i in range(num_layers))

    def reset_parameters(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()

    def forward(
        self, input: Tensor | PackedSequence, state: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(input, PackedSequence):
            return self._packed(input, state)
        I, order = self.input_size, "B, T" if self.batch_first else "T, B"
        _check_input(input, (2, 3), f"[{order}, {I}] or, of one sequence, [T, {I}]", I)
        is_batched = input.dim() == 3
        turned = is_batched and self.batch_first
        x = input.transpose(0, 1) if turned else input
        if not len(x):
            raise ValueError(f"input must have at least one time step, got shape {list(input.shape)}")
        full = self._full_state(state, x.shape[1:-1], x)
        full = full if is_batched else map_state(full, lambda s: s.unsqueeze(1))
        output, last = self._run(x.reshape(-1, I), full)
        output = output.view(*x.shape[:-1], self.hidden_size)
        last = last if is_batched else map_state(last, lambda s: s.squeeze(1))
        return output.transpose(0, 1) if turned else output, self.layers[0]._returned(last)

    def _packed(self, input: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        x, batch_sizes, to_sorted, to_unsorted = input
        _check_input(x, (2,), f"packed [N, {self.input_size}]", self.input_size)
        if not len(batch_sizes):
            raise ValueError("input must have at least one time step, got batch_sizes []")
        # the number in batch_sizes is a value, of which a compiled graph knows nothing
        B = int(batch_sizes[0]) if to_sorted is None else len(to_sorted)
        full = self._full_state(state, [B], x)
        if to_sorted is not None:
            full = map_state(full, lambda s: s.index_select(1, to_sorted))
        output, last = self._run(x, full, batch_sizes)
        if to_unsorted is not None:
            last = map_state(last, lambda s: s.index_select(1, to_unsorted))
        return PackedSequence(output, batch_sizes, to_sorted, to_unsorted), self.layers[0]._returned(last)

    def _full_state(self, state: State | None, lead: Sequence[int], x: Tensor) -> LSTMState:
        return _full_state(state, self.layers[0].state_sizes, (self.num_layers, *lead), x)

    def _run(
        self, x: Tensor, state: LSTMState, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Layer after layer over x [N, I] from state [num_layers, B, ...]."""
        last = []
        for i, layer in enumerate(self.layers):
            if i and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            own = map_state(state, lambda s, i=i: s[i])
            x, own = layer._sequence(x, own, batch_sizes)
            last.append(own)
        return x, LSTMState(*(None if s[0] is None else torch.stack(s) for s in zip(*last, strict=True)))

    def extra_repr(self) -> str:
        options = {"num_layers": self.num_layers, "batch_first": self.batch_first, "dropout": self.dropout}
        defaults = {"num_layers": 1, "batch_first": False, "dropout": 0.0}
        shown = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])


class LSTM(_Layers):
    """`nn.LSTM` with layer norm and recurrent dropout, if wanted: same calling conventions, packed sequences
    included, and the same results without them (bias here is bias_ih + bias_hh there).

    Input [T, B, I] ([B, T, I] with batch_first), [T, I] or packed, state (h, c) of [num_layers, B, H] each or
    None (zeros) -> output like the input with H features, last state (h, c). dropout: between layers, in
    training. `layers[i]` is the `LSTMCell` of layer i, with its parameters; layer_norm, recurrent_dropout,
    backend and errors: see there.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        def cell(inputs: int) -> LSTMCell:
            options = layer_norm, recurrent_dropout
            return LSTMCell(inputs, hidden_size, *options, backend=backend, device=device, dtype=dtype)

        super().__init__(cell, input_size, hidden_size, num_layers, batch_first, dropout)


class HyperLSTM(_Layers):
    """The LSTM whose gates a smaller LSTM scales and shifts at every step, with the calling conventions of
    `nn.LSTM`: see `HyperLSTMCell` for the equations, of which `layers[i]` is that of layer i.

    Input [T, B, I] ([B, T, I] with batch_first), [T, I] or packed; state: `LSTMState` of h and c [num_layers,
    B, H] and hyper_h and hyper_c [num_layers, B, M], a tuple of these four or of h and c alone, or None
    (zeros) -> output like the input with H features, last `LSTMState`. Runs all steps of a layer in one op,
    forward and backward; for a row of a step it keeps 10 H + 10 M numbers. dropout: between layers, in
    training. recurrent_dropout draws its key from torch's generator, so `torch.manual_seed` repeats it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        hyper_size: int = 128,
        embedding_size: int = 16,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        def cell(inputs: int) -> HyperLSTMCell:
            options = hyper_size, embedding_size, layer_norm, recurrent_dropout
            return HyperLSTMCell(inputs, hidden_size, *options, backend=backend, device=device, dtype=dtype)

        super().__init__(cell, input_size, hidden_size, num_layers, batch_first, dropout)
