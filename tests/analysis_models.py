"""Networks for the analyses, and all that must not change in them."""

import torch
from torch import nn

import hyperfast


class Net(nn.Module):
    """Batch norm, dropout, a frozen layer, a weight in two places and a buffer that is no BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.head.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.5]), persistent=False)
        self.register_buffer("zeros", torch.zeros(2))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x - self.mean))).mean((2, 3))
        return self.head(self.drop(self.second(torch.relu(self.first(x)))))


def hyper(generator="linear", **options):
    targets = ["conv", "first"]
    return hyperfast.hyperize(Net(), generator, targets=targets, z_dim=3, init="hyperfan", **options)


MODELS = {
    "plain": Net,
    "hyper": hyper,
    "factored": lambda: hyperfast.factored_(hyper()),
    "factored, no bias": lambda: hyperfast.factored_(hyper(bias=False)),
    "factored, shared": lambda: hyperfast.factored_(hyper("shared")),
}


def everything(model):
    """All of a model's state, by name, that can be compared."""
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        {n: (id(t), t.data_ptr(), t.stride(), t.requires_grad, id(t.grad)) for n, t in names},
        {n: (id(m), {key: id(value) for key, value in vars(m).items()}) for n, m in model.named_modules()},
        {n: t.detach().numpy().tobytes() for n, t in names},
        {n: t.grad.numpy().tobytes() for n, t in names if t.grad is not None},
        torch.get_rng_state().tolist(),
    )
