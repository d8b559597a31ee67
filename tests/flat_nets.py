"""A network with everything that flattening could break, scattered and flattened, and how to compare the two."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt


def lay(module: Any, memory_format: torch.memory_format) -> nn.Conv2d:
    """Change the memory format of a convolution in place."""
    return module.to(memory_format=memory_format)


def grad(p: Tensor) -> Tensor:
    """The gradient, which must be there."""
    assert p.grad is not None
    return p.grad


class Net(nn.Module):
    """Convolution in channels-last memory, tied embedding and head, a 0-dim and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.conv = lay(nn.Conv2d(3, 4, 2), torch.channels_last)
        self.linear = nn.Linear(4, 5)
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(7))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        features = self.conv(images).mean(dim=(2, 3))
        return self.scale * self.head(torch.tanh(self.linear(features)) + self.embedding(tokens))


def pair(device: str, grads: bool = False) -> tuple[Net, Net]:
    """A scattered and a flattened network with equal numbers."""
    scattered = Net().to(device)
    flat = copy.deepcopy(scattered)
    fusedopt.flatten_(flat.named_parameters(), grads=grads)
    return scattered, flat


def backward(*nets: nn.Module) -> None:
    """Add the gradient of one random batch to every network."""
    device = next(nets[0].parameters()).device
    images, tokens = torch.randn(2, 3, 5, 5, device=device), torch.randint(6, (2,), device=device)
    for net in nets:
        net(images, tokens).square().sum().backward()


def assert_equal(a: nn.Module, b: nn.Module, opt_a: Any = None, opt_b: Any = None) -> None:
    """Parameters, gradients and state agree bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert torch.equal(p.grad, q.grad) and p.grad.stride() == q.grad.stride(), name
        if opt_a is not None:
            states = opt_a.state.get(p, {}), opt_b.state.get(q, {})
            assert states[0].keys() == states[1].keys(), name
            assert all(torch.equal(states[0][k], v) for k, v in states[1].items()), name


def one_storage(tensors: list[Tensor]) -> bool:
    return len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def assert_same_numbers(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
