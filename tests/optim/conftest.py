import pytest
from torch import nn

import hyperfast
from tests.optim.net import Net


@pytest.fixture
def pair(plain_twin):
    """(model in factored mode, plain twin), float64, z large enough to matter."""
    net = Net().double()
    for _, g in hyperfast.nn.named_generators(net):
        nn.init.normal_(g.z, std=0.3)
    twin = plain_twin(net)
    return hyperfast.factored_(net), twin
