"""The HyperLSTM cell as users write it in plain PyTorch today: a module for one step, after the public
ports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperfast.nn import HyperLSTMCell


class PlainLSTMCell(nn.Module):
    """An LSTM step, with layer norm of gates and cell state if wanted."""

    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool):
        super().__init__()
        self.x = nn.Linear(input_size, 4 * hidden_size)
        self.h = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.norms = nn.ModuleList(
            nn.LayerNorm(hidden_size) if layer_norm else nn.Identity() for _ in range(4)
        )
        self.norm_c = nn.LayerNorm(hidden_size) if layer_norm else nn.Identity()

    def activate(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (norm(gate) for norm, gate in zip(self.norms, gates.chunk(4, 1), strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.activate(self.x(x) + self.h(h), c)


class PlainHyperLSTMCell(PlainLSTMCell):
    """A HyperLSTM step with the weights of `ours`."""

    def __init__(self, ours: HyperLSTMCell):
        I, H, M, Z = ours.input_size, ours.hidden_size, ours.hyper_size, ours.embedding_size
        super().__init__(I, H, ours.layer_norm)
        self.x = nn.Linear(I, 4 * H, bias=False)
        self.hyper = PlainLSTMCell(I + H, M, ours.layer_norm)
        self.z_x, self.z_h = nn.Linear(M, 4 * Z), nn.Linear(M, 4 * Z)
        self.z_b = nn.Linear(M, 4 * Z, bias=False)
        self.d_x = nn.ModuleList(nn.Linear(Z, H, bias=False) for _ in range(4))
        self.d_h = nn.ModuleList(nn.Linear(Z, H, bias=False) for _ in range(4))
        self.d_b = nn.ModuleList(nn.Linear(Z, H) for _ in range(4))
        self.to(ours.weight_hh.dtype)
        own = dict(self.named_parameters())
        for name, parts in self.parts().items():
            tensors = [own[part].data for part in parts]
            weight = ours.get_parameter(name).detach().reshape(-1, *tensors[0].shape[1:])
            for tensor, part in zip(tensors, weight.split([len(t) for t in tensors]), strict=True):
                tensor.copy_(part)

    def parts(self) -> dict[str, list[str]]:
        """Parameter of `HyperLSTMCell` -> the parameters here it is made of, one below the other."""
        gates = range(4)
        parts = {
            "weight_ih": ["x.weight"],
            "weight_hh": ["h.weight"],
            "bias": [f"d_b.{i}.bias" for i in gates],
        }
        parts |= {"z_weight": ["z_x.weight", "z_h.weight", "z_b.weight"], "z_bias": ["z_x.bias", "z_h.bias"]}
        parts["d_weight"] = [f"{d}.{i}.weight" for d in ("d_x", "d_h", "d_b") for i in gates]
        parts |= {f"hyper_weight_{t}h": [f"hyper.{'x' if t == 'i' else 'h'}.weight"] for t in "ih"}
        parts["hyper_bias"] = ["hyper.x.bias"]
        for kind in ("weight", "bias") if isinstance(self.norm_c, nn.LayerNorm) else ():
            for prefix, module in (("", ""), ("hyper_", "hyper.")):
                parts[f"{prefix}gates_norm_{kind}"] = [f"{module}norms.{i}.{kind}" for i in gates]
                parts[f"{prefix}cell_norm_{kind}"] = [f"{module}norm_c.{kind}"]
        return parts

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c, hyper_h, hyper_c = state
        hyper_h, hyper_c = self.hyper(torch.cat([x, h], 1), hyper_h, hyper_c)
        d_x, d_h, d_b = (
            torch.cat([to_d(z) for to_d, z in zip(ds, to_z(hyper_h).chunk(4, 1), strict=True)], 1)
            for to_z, ds in ((self.z_x, self.d_x), (self.z_h, self.d_h), (self.z_b, self.d_b))
        )
        h, c = self.activate(d_x * self.x(x) + d_h * self.h(h) + d_b, c)
        return h, c, hyper_h, hyper_c
