"""`torch.set_default_device` says where tensors without a device go; the inputs' device decides here.

The meta device stands for a GPU: what is computed there by mistake cannot be computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gpytorch
import pytest
import torch
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.iterative import IterativeSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver

pytestmark = pytest.mark.cpu_only

N = 30


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, outputs),
    )  # fmt: skip


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, **options):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network())
        self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network(), **options))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def fitted(model: Model) -> Tensor:
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
    loss = mll(model(*model.train_inputs), model.train_targets)
    return torch.stack([g.sum() for g in torch.autograd.grad(loss, list(model.parameters()))])


def fast_variance(model: Model) -> Tensor:
    with gpytorch.settings.fast_pred_var():
        return model.eval()(model.train_inputs[0][:3]).variance


OPERATIONS: dict[str, Callable[[Model], Tensor]] = {
    "mean": lambda model: model.eval()(model.train_inputs[0][:3] + 1).mean,
    "variance": lambda model: model.eval()(model.train_inputs[0][:3] + 1).variance,
    "covariance": lambda model: model.eval()(model.train_inputs[0][:3] + 1).covariance_matrix,
    "fast variance": fast_variance,
    "loss": fitted,
    "adapted network": lambda model: ntk_gp.adapted_network(model.eval())(model.train_inputs[0]),
    "average": lambda model: ntk_gp.averaged(model, draws=4, seed=0).predict(model.train_inputs[0][:3]).quantile(0.5),
    "drawn functions": lambda model: ntk_gp.draw_functions(
        model.eval(), 2, generator=torch.Generator(device="cpu").manual_seed(0)
    )(model.train_inputs[0]),
    "columns": lambda model: model.covar_module(model.train_inputs[0]) @ model.train_targets,
    "rows": lambda model: model.covar_module(model.train_inputs[0])[2:5, 1:3].to_dense(),
    "Jacobian": lambda model: model.covar_module.base_kernel.jacobian(model.train_inputs[0]).to_dense(),
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (FunctionSpaceSolver, {}),
        (WeightSpaceSolver, {"variance_groups": "layer"}),
        pytest.param(IterativeSolver, {"engine": "autodiff"}, marks=pytest.mark.names_engine),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_inputs_decide(operation, way, options, elsewhere, monkeypatch):
    if operation == "average" and way is not WeightSpaceSolver:
        pytest.skip("it says nothing of the way to solve")
    monkeypatch.setattr(ntk_gp.solvers.choice, "solver_class", lambda system: way)
    with torch.device("cpu"):
        x, y = torch.randn(N, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, N)
        expected = OPERATIONS[operation](Model(x, y, **options)).detach()
        model = Model(x, y, **options)
    actual = OPERATIONS[operation](model).detach()
    assert actual.device.type == "cpu"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
