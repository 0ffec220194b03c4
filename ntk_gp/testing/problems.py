"""A system K + D of any shape, and everything about it in dense form, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..jacobian.linearization import Linearization
from ..network import FrozenNetwork
from ..solvers import System
from .explicit import explicit_jacobian

_INPUTS, _WIDTH, _TEST_POINTS = 3, 8, 7


class SolverProblem:
    """K + D of a small network with two groups of parameters, from the package and in dense form.

    The network has 41 parameters for one output, so that 12 points are fewer rows than parameters, and 60 more.

    :param n: The number of training points.
    :param batches: How many inputs, prior variances and noises come in a batch; each is 1 or the largest.
    :param outputs: C.
    :param noise: The noises are this size, each 0.5 to 1.5 times it.
    :param unit_variances: Whether prior variances are one; they are random otherwise.

    :ivar system: What a solver is made of.
    :ivar torch.Tensor matrix: K + D, (B, N, N).
    :ivar torch.Tensor rhs: Right-hand sides, (B, N, 4).
    :ivar torch.Tensor jacobian: J at the training points, (B, N, P), by :func:`~ntk_gp.testing.explicit_jacobian`.
    :ivar torch.Tensor test_jacobian: J at the test points, (B, M, P).
    :ivar torch.Tensor parameter_variances: The diagonal of Σ, (W, P).
    :ivar torch.Tensor groups: The group of each parameter, (P,).
    :ivar torch.Tensor covariance: The posterior covariance at the test points, (B, M, M).
    """

    def __init__(
        self,
        n: int,
        batches: tuple[int, int, int] = (1, 1, 1),
        outputs: int = 1,
        noise: float = 0.1,
        unit_variances: bool = False,
    ):
        x_batch, weight_batch, noise_batch = batches
        self.network = _network(outputs)
        generator = torch.Generator(device="cpu").manual_seed(1)

        def uniform(*shape: int) -> Tensor:
            return 0.5 + _here(torch.rand(*shape, dtype=torch.float64, generator=generator, device="cpu"))

        self.outputs = outputs
        self.x, self.test_x = _inputs(x_batch, n, seed=0), _inputs(x_batch, _TEST_POINTS, seed=2)
        self.group_variances = torch.ones(1, 2, dtype=torch.float64) if unit_variances else uniform(weight_batch, 2)
        self.noise = noise * uniform(noise_batch, n * outputs)
        frozen = FrozenNetwork(self.network, output="all", group_by=_layer)
        self.system = System(Linearization(frozen), self.x, self.group_variances, self.noise)
        sizes = torch.tensor([sum(p.numel() for p in self.network[i].parameters()) for i in (0, 2)])
        self.parameter_variances = self.group_variances.repeat_interleave(sizes, dim=-1)
        self.groups = torch.arange(2).repeat_interleave(sizes)
        self.jacobian = explicit_jacobian(self.network, self.x)
        self.test_jacobian = explicit_jacobian(self.network, self.test_x)
        batch = max(batches)
        root = self.jacobian * self.parameter_variances.unsqueeze(-2)
        self.matrix = (root @ self.jacobian.mT + torch.diag_embed(self.noise)).expand(batch, -1, -1)
        self.rhs = _here(torch.randn(batch, n * outputs, 4, dtype=torch.float64, generator=generator, device="cpu"))
        cross = root @ self.test_jacobian.mT
        prior = (self.test_jacobian * self.parameter_variances.unsqueeze(-2)) @ self.test_jacobian.mT
        self.covariance = prior - cross.mT @ torch.linalg.solve(self.matrix, cross)

    def beginning(self, n: int) -> System:
        """The system of the first n points alone."""
        noise = self.noise[:, : n * self.outputs]
        return System(self.system.linearization, self.x[:, :n], self.group_variances, noise)


def _layer(name: str) -> str:
    return name.split(".")[0]


def _network(outputs: int) -> nn.Sequential:
    """The same each time, whatever the state of random numbers, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(_INPUTS, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, outputs)).double()


def _inputs(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return _here(torch.randn(*shape, _INPUTS, dtype=torch.float64, generator=generator, device="cpu"))


def _here(drawn: Tensor) -> Tensor:
    """On the default device: the same numbers wherever a solver is tried."""
    return drawn.to(torch.get_default_device())
