"""Nothing n×n is formed, and the memory budget is kept, wherever the budget has no room for the matrix."""

from collections.abc import Callable

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.operators import LinearOperator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.jacobian import kept_grams
from ntk_gp.jacobian.memory import mirror_upper_triangle
from ntk_gp.jacobian.structured.held import StructuredJacobian
from tests import references

POINTS = 600
BUDGET = 400_000  # bytes
MATRIX = 8 * POINTS**2


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.name = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            made = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 8 * tensor._nnz()
            if made > self.bytes:
                self.bytes, self.name = made, f"{function} {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("size", [1, 700, 1_300])
def test_mirrored_triangle(size):
    matrix = torch.randn(2, size, size)
    symmetric = matrix.triu() + matrix.triu(1).mT
    lower = matrix.mT.contiguous()
    mirror_upper_triangle(matrix)
    mirror_upper_triangle(lower.mT)
    assert torch.equal(matrix, symmetric)
    assert torch.equal(lower, symmetric)


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, outputs)).double()


def make_kernel(outputs: int = 1, **options: str) -> Kernel:
    network = make_network(outputs)
    return ScaleKernel(NTKKernel(network, output="all" if outputs > 1 else None, **options)).double()


def inputs(outputs: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(POINTS // outputs, 3, dtype=torch.float64)


OPERATIONS: dict[str, Callable[[LinearOperator], object]] = {
    "diagonal": lambda operator: operator.diagonal(),
    "row": lambda operator: operator[5],
    "column": lambda operator: operator[:, 7],
    "some rows": lambda operator: operator[torch.tensor([4, 1, 77])].to_dense(),
    "slice": lambda operator: operator[1:70:13, 5:].to_dense(),
    "entries": lambda operator: operator[torch.arange(50), torch.arange(50).flip(0)],
    "product": lambda operator: operator @ torch.ones(POINTS, 3, dtype=torch.float64),
    "many products": lambda operator: [operator @ torch.ones(POINTS, 3, dtype=torch.float64) for _ in range(3)],
    "transposed product": lambda operator: operator.mT @ torch.ones(POINTS, 3, dtype=torch.float64),
    "slice of a product": lambda operator: operator[:60] @ torch.ones(POINTS, 3, dtype=torch.float64),
    "pivoted Cholesky": lambda operator: operator.pivoted_cholesky(8),
    "lanczos": lambda operator: lanczos(operator),
}


def lanczos(operator: LinearOperator) -> Tensor:
    with gpytorch.settings.max_root_decomposition_size(8):
        return operator.root_decomposition(method="lanczos").root.to_dense()


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operators(name, outputs, engine):
    operator = make_kernel(outputs, engine=engine)(inputs(outputs)).evaluate_kernel()
    with ntk_gp.settings.memory_budget(BUDGET), gpytorch.settings.max_cholesky_size(1), LargestTensor() as largest:
        OPERATIONS[name](operator)
    assert largest.bytes <= BUDGET, largest.name


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
def test_operators_give_the_same(engine):
    """The budget changes how, not what."""
    operator = make_kernel(engine=engine)(inputs()).evaluate_kernel()
    expected = references.kernel(make_network(), inputs()) * make_kernel().outputscale.detach()
    with ntk_gp.settings.memory_budget(BUDGET):
        torch.testing.assert_close(operator.diagonal(), expected.diagonal(), rtol=0, atol=1e-10)
        torch.testing.assert_close(operator[5], expected[5], rtol=0, atol=1e-10)
        rhs = torch.randn(POINTS, 3, dtype=torch.float64)
        torch.testing.assert_close(operator @ rhs, expected @ rhs, rtol=0, atol=1e-9)
        indices = torch.arange(50), torch.arange(50).flip(0)
        torch.testing.assert_close(operator[indices], expected[indices], rtol=0, atol=1e-10)


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, outputs: int):
        likelihood = GaussianLikelihood() if outputs == 1 else MultitaskGaussianLikelihood(num_tasks=outputs)
        super().__init__(x, y, likelihood)
        self.mean_module = NetworkMean(make_network(outputs), output="all" if outputs > 1 else None)
        self.covar_module = make_kernel(outputs)
        self.double()
        self.likelihood.noise = 0.5

    def forward(self, x: Tensor) -> MultivariateNormal:
        distribution = MultivariateNormal if self.mean_module.network.output is None else MultitaskMultivariateNormal
        return distribution(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize(
    ("outputs", "love"), [(1, True), (1, False), pytest.param(3, True, marks=pytest.mark.thorough)]
)
def test_prediction(outputs, love):
    x = inputs(outputs)
    y = torch.sin(x.sum(-1)) if outputs == 1 else torch.sin(x)
    model = AdaptedGP(x, y, outputs).eval()
    with (
        ntk_gp.settings.memory_budget(BUDGET),
        gpytorch.settings.max_cholesky_size(1),
        gpytorch.settings.fast_pred_var(love),
        LargestTensor() as largest,
    ):
        prediction = model(x[:10] + 0.1)
        _ = prediction.mean, prediction.variance
    # a preconditioner's factor is N×rank, and may take more than one chunk does
    assert largest.bytes <= MATRIX // 3, largest.name


def test_training():
    x = inputs()
    y = torch.sin(x.sum(-1))
    model = AdaptedGP(x, y, 1)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    with ntk_gp.settings.memory_budget(BUDGET), gpytorch.settings.max_cholesky_size(1), LargestTensor() as largest:
        (-mll(model(x), y)).backward()
    assert largest.bytes <= BUDGET, largest.name


def test_variances_of_many_points():
    """kernel(x, diag=True) is what predictive variances ask for."""
    x = torch.randn(20_000, 3, dtype=torch.float64)
    kernel = make_kernel()
    with ntk_gp.settings.memory_budget(BUDGET), LargestTensor() as largest:
        kernel(x, diag=True)
    assert largest.bytes <= max(BUDGET, x.nbytes)


def test_caches_stay_within_the_budget():
    kernel = NTKKernel(make_network())
    with ntk_gp.settings.memory_budget(BUDGET):
        for i in range(20):
            kernel(inputs()[i : i + 100]).to_dense()
    entries = kernel._linearization._cache._entries
    assert 0 < sum(entry.nbytes for entry in entries) <= BUDGET


@pytest.fixture
def formed(monkeypatch) -> list[int]:
    """One entry for each Gram matrix that the structured engine forms; each counts as large."""
    monkeypatch.setattr(kept_grams, "_LARGE", 1)
    calls: list[int] = []
    original = StructuredJacobian.gram
    monkeypatch.setattr(StructuredJacobian, "gram", lambda *args: calls.append(1) or original(*args))
    return calls


def test_a_large_gram_matrix_is_stored_when_it_is_asked_for_again(formed):
    kernel, x = NTKKernel(make_network(), engine="structured"), inputs()

    def stored() -> list[Tensor]:
        return [entry.value for entry in kernel._linearization._cache._entries if entry.label[0] == "gram"]

    matrices = [kernel(x).to_dense() for _ in range(2)]
    assert len(formed) == 2 and len(stored()) == 1
    matrices += [kernel(x).to_dense() for _ in range(2)]
    assert len(formed) == 2
    for matrix in matrices:
        torch.testing.assert_close(matrix, matrices[0], rtol=1e-15, atol=0)
        assert matrix.data_ptr() != stored()[0].data_ptr()


def test_products_store_a_large_gram_matrix_once_it_has_paid(formed):
    kernel, x = NTKKernel(make_network(), engine="structured"), inputs()
    operator, rhs = kernel(x).evaluate_kernel(), torch.randn(POINTS, 100, dtype=torch.float64)
    products = [operator @ rhs for _ in range(5)]
    assert len(formed) == 1
    torch.testing.assert_close(products[-1], products[0], rtol=1e-12, atol=1e-12)
