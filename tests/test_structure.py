"""What GPyTorch solves by structure is solved by it with an NTK inside: as cheap as with a stock kernel, and exact."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    GridInterpolationKernel,
    InducingPointKernel,
    Kernel,
    LCMKernel,
    MultitaskKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.operators import (
    BatchRepeatLinearOperator,
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    CatLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    InterpolatedLinearOperator,
    KroneckerProductDiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    LowRankRootLinearOperator,
    MaskedLinearOperator,
    MatmulLinearOperator,
    PsdSumLinearOperator,
    RootLinearOperator,
    SumBatchLinearOperator,
    SumLinearOperator,
)
from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ntk_gp import NTKKernel
from ntk_gp.bridge.exactly_solved import exactly_solved
from tests import references
from tests.adapted import assert_close, data, network

pytestmark = pytest.mark.engine_independent

F64 = torch.float64
_FACTORISATIONS = ("cholesky", "eigh", "lu_factor", "slogdet", "solve_ex", "qr", "svd", "inv_ex")


class Work(TorchDispatchMode):
    """Counts what is computed: the size of the largest matrix factorised, and flops of products and factorisations."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        name = str(packet)
        is_factorisation = "sqrt" not in name and any(kind in name for kind in _FACTORISATIONS)
        if is_factorisation and args and isinstance(args[0], Tensor) and args[0].dim() > 1:
            self.largest = max(self.largest, args[0].shape[-1])
            self.flops += args[0].numel() * args[0].shape[-1] * (9 if "eigh" in name or "svd" in name else 1 / 3)
        return out


def matrix_of(kernel: Kernel, n: int, *batch: int) -> LinearOperator:
    return kernel(data(n, *batch, inputs=2)[0]).evaluate_kernel()


def task_matrix(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(1))
    return root @ root.mT + torch.eye(size, dtype=F64)


def constant(n: int) -> ConstantDiagLinearOperator:
    return ConstantDiagLinearOperator(torch.tensor([0.3], dtype=F64), diag_shape=n)


def diagonal(*shape: int) -> DiagLinearOperator:
    return DiagLinearOperator(torch.linspace(0.1, 0.4, math.prod(shape), dtype=F64).reshape(shape))


def interpolated(kernel: Kernel, n: int, grid: int) -> InterpolatedLinearOperator:
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(grid, (n, 4), generator=generator)
    values = torch.rand(n, 4, dtype=F64, generator=generator)
    return InterpolatedLinearOperator(matrix_of(kernel, grid), indices, values, indices, values)


def seen(n: int) -> Tensor:
    return torch.arange(n) % 10 > 0


# Every operator that can hold a kernel's matrix, at more than 800 rows.
OPERATORS: dict[str, Callable[[Kernel], LinearOperator]] = {
    "K + D": lambda k: matrix_of(k, 900) + diagonal(900),
    "K + c": lambda k: matrix_of(k, 900) + constant(900),
    "batch repeat": lambda k: BatchRepeatLinearOperator(matrix_of(k, 900) + constant(900), Size([2])),
    "batch repeat inside": lambda k: BatchRepeatLinearOperator(matrix_of(k, 900), Size([2])) + diagonal(2, 900),
    "block diagonal": lambda k: BlockDiagLinearOperator(matrix_of(k, 300, 3) + diagonal(3, 300)),
    "block diagonal, noise outside": lambda k: BlockDiagLinearOperator(matrix_of(k, 300, 3)) + diagonal(900),
    "block interleaved": lambda k: BlockInterleavedLinearOperator(matrix_of(k, 300, 3)) + constant(900),
    "block interleaved, diagonal": lambda k: BlockInterleavedLinearOperator(matrix_of(k, 300, 3)) + diagonal(900),
    "blocks times constant": lambda k: (
        ConstantMulLinearOperator(BlockInterleavedLinearOperator(matrix_of(k, 300, 3)), torch.tensor(2.0, dtype=F64))
        + constant(900)
    ),
    "concatenated batches": lambda k: (
        CatLinearOperator(matrix_of(k, 850, 1), matrix_of(k, 850, 1) * 2.0, dim=0) + diagonal(2, 850)
    ),
    "constant": lambda k: ConstantMulLinearOperator(matrix_of(k, 900), torch.tensor(2.0, dtype=F64)) + diagonal(900),
    "interpolated": lambda k: interpolated(k, 1500, 40) + constant(1500),
    "kronecker": lambda k: KroneckerProductLinearOperator(matrix_of(k, 220), task_matrix(4)) + constant(880),
    "kronecker, noise of each task": lambda k: (
        KroneckerProductLinearOperator(matrix_of(k, 220), task_matrix(4))
        + KroneckerProductDiagLinearOperator(constant(220), diagonal(4))
    ),
    "kronecker, correlated noise": lambda k: (
        KroneckerProductLinearOperator(matrix_of(k, 220), task_matrix(4))
        + KroneckerProductLinearOperator(constant(220), DenseLinearOperator(task_matrix(4)))
    ),
    "kronecker the other way": lambda k: (
        KroneckerProductLinearOperator(task_matrix(4), matrix_of(k, 220)) + constant(880)
    ),
    "kronecker of three": lambda k: (
        KroneckerProductLinearOperator(matrix_of(k, 40), task_matrix(4), matrix_of(k, 6)) + constant(960)
    ),
    "kronecker times constant": lambda k: (
        ConstantMulLinearOperator(
            KroneckerProductLinearOperator(matrix_of(k, 220), task_matrix(4)), torch.tensor(2.0, dtype=F64)
        )
        + constant(880)
    ),
    "kronecker, batch": lambda k: (
        KroneckerProductLinearOperator(matrix_of(k, 205, 2), task_matrix(4).expand(2, 4, 4))
        + ConstantDiagLinearOperator(torch.tensor([[0.3], [0.4]], dtype=F64), diag_shape=820)
    ),
    "large factor": lambda k: KroneckerProductLinearOperator(matrix_of(k, 810), task_matrix(2)) + constant(1620),
    "low rank": lambda k: LowRankRootLinearOperator(matrix_of(k, 900).to_dense()[:, :20]) + diagonal(900),
    "masked": lambda k: MaskedLinearOperator(matrix_of(k, 1000) + diagonal(1000), seen(1000), seen(1000)),
    "product of matrices": lambda k: MatmulLinearOperator(matrix_of(k, 850), matrix_of(k, 850).mT) + diagonal(850),
    "psd sum": lambda k: PsdSumLinearOperator(matrix_of(k, 850), matrix_of(RBFKernel().double(), 850)) + diagonal(850),
    "root": lambda k: RootLinearOperator(matrix_of(k, 850)) + diagonal(850),
    "sum": lambda k: SumLinearOperator(matrix_of(k, 850), matrix_of(RBFKernel().double(), 850)) + diagonal(850),
    "sum over batches": lambda k: SumBatchLinearOperator(matrix_of(k, 850, 2)) + diagonal(850),
}
# What others stand for, too.
MORE_OF_THE_SAME = {"batch repeat", "kronecker, batch", "kronecker times constant", "large factor", "psd sum", "root"}
# By one dense factor, where GPyTorch iterates until the residual is 1.
DENSE = {"concatenated batches", "product of matrices", "psd sum", "root", "sum", "sum over batches"}


def evaluate(kernel: Kernel, name: str) -> tuple[Tensor, LinearOperator, Tensor]:
    matrix = OPERATORS[name](kernel)
    n = matrix.shape[-1]
    value = torch.linspace(-1, 1, n, dtype=F64).expand(*matrix.batch_shape, n)
    distribution = MultivariateNormal(torch.zeros_like(value), matrix)
    return distribution.log_prob(value), matrix, value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name in MORE_OF_THE_SAME else ()) for name in OPERATORS],
)
def test_likelihoods_are_exact_and_as_cheap_as_with_a_stock_kernel(name):
    net = network(inputs=2)
    kernel, stock = ScaleKernel(NTKKernel(net)).double(), ScaleKernel(RBFKernel()).double()
    work = []
    for each in (kernel, stock):
        with quiet():
            evaluate(each, name)[0].sum().backward()  # what is computed once
            with Work() as counted:
                evaluate(each, name)[0].sum().backward()
        work.append(counted)
    ours, theirs = work
    actual, matrix, value = evaluate(kernel, name)
    if name not in DENSE:
        # 41 parameters; blocks and factors of 300, where GPyTorch iterates over the whole until the residual is 1
        structure = 300 if "block" in name or name == "kronecker times constant" else 41
        assert ours.largest <= max(theirs.largest, structure)
        assert ours.flops <= 2 * theirs.flops
    assert ours.flops <= 2 * theirs.flops + 8 * matrix.shape[-1] ** 3 * matrix.batch_shape.numel()

    dense = matrix.to_dense()
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(value), dense).log_prob(value)
    assert_close(actual, expected)
    (a,), (b,) = (torch.autograd.grad(v.sum(), [kernel.raw_outputscale], retain_graph=True) for v in (actual, expected))
    assert_close(a, b, 1e-7)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name in MORE_OF_THE_SAME else ()) for name in OPERATORS],
)
def test_solves_and_roots_are_exact(name):
    kernel = ScaleKernel(NTKKernel(network(inputs=2))).double()
    matrix = OPERATORS[name](kernel)
    solved, dense = exactly_solved(matrix), matrix.to_dense()
    rhs = torch.randn(*matrix.shape[:-1], 2, dtype=F64)
    solution, expected = solved.solve(rhs), torch.linalg.solve(dense, rhs)
    assert_close(solution, expected)
    (a,), (b,) = (
        torch.autograd.grad(v.sin().sum(), [kernel.raw_outputscale], retain_graph=True) for v in (solution, expected)
    )
    assert_close(a, b, 1e-7)
    assert_close(solved.solve(rhs[..., 0, :, 0] if rhs.dim() > 3 else rhs[..., :1])[..., :1], expected[..., :1])
    with torch.no_grad():
        root = solved.root_decomposition().root.to_dense()
        if name != "low rank":  # GPyTorch's own
            assert_close(root @ root.mT, dense)


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood, kernel: Kernel, tasks: int = 1, independent: bool = False):
        super().__init__(x, y, likelihood.double())
        self.covar_module, self.tasks, self.independent = kernel.double(), tasks, independent

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = torch.zeros(x.shape[-2], self.tasks, dtype=x.dtype) + x.sin().sum(-1, keepdim=True)
        covariance = self.covar_module(x)
        if self.independent:
            return MultitaskMultivariateNormal.from_batch_mvn(MultivariateNormal(mean.mT, covariance))
        if self.tasks > 1:
            return MultitaskMultivariateNormal(mean, covariance)
        return MultivariateNormal(mean.squeeze(-1), covariance)


def multitask(net) -> Kernel:
    return MultitaskKernel(ScaleKernel(NTKKernel(net)), num_tasks=3, rank=2)


def kron(kernel: MultitaskKernel, net, x: Tensor) -> Tensor:
    scale = kernel.data_covar_module.outputscale
    return torch.kron(scale * references.kernel(net, x), kernel.task_covar_module.covar_matrix.to_dense())


def noise_of(likelihood, n: int) -> Tensor:
    if isinstance(likelihood, GaussianLikelihood):
        return likelihood.noise * torch.eye(n, dtype=F64)
    noise = torch.zeros(3, 3, dtype=F64)
    if likelihood.has_task_noise:
        noise = noise + (likelihood.task_noise_covar if likelihood.rank else likelihood.task_noises.diag())
    if likelihood.has_global_noise:
        noise = noise + likelihood.noise * torch.eye(3, dtype=F64)
    return torch.kron(torch.eye(n, dtype=F64), noise)


def independent(kernel: ScaleKernel, net, x: Tensor) -> Tensor:
    blocks = kernel.outputscale.reshape(3, 1, 1) * references.kernel(net, x)
    n = x.shape[-2]
    dense = torch.zeros(n, 3, n, 3, dtype=F64)
    return dense.diagonal_scatter(blocks.permute(1, 2, 0), dim1=1, dim2=3).reshape(3 * n, 3 * n)


class GridKernel(Kernel):
    """Linear interpolation of an NTK from a grid on the line."""

    def __init__(self, base: Kernel):
        super().__init__()
        self.base = base

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> LinearOperator | Tensor:
        matrix = InterpolatedLinearOperator(self.base(GRID, GRID), *place(x1), *place(x2))
        return matrix.diagonal(dim1=-1, dim2=-2) if diag else matrix


GRID = torch.linspace(-6, 6, 30, dtype=F64).unsqueeze(-1)


def place(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the two grid points around each input, and their weights."""
    position = (x + 6) / 12 * 29
    low = position.floor().clamp(0, 28)
    return torch.cat([low, low + 1], -1).long(), torch.cat([1 - (position - low), position - low], -1)


def interpolation(kernel: GridKernel, net, x: Tensor) -> Tensor:
    weights = torch.zeros(len(x), len(GRID), dtype=F64).scatter_add(1, *place(x))
    return weights @ (kernel.base.outputscale * references.kernel(net, GRID)) @ weights.mT


class Structure(NamedTuple):
    kernel: Callable[..., Kernel]
    likelihood: Callable[[], gpytorch.likelihoods.Likelihood]
    dense: Callable[..., Tensor]
    tasks: int = 1
    inputs: int = 2


STRUCTURES = {
    "multitask": Structure(multitask, lambda: MultitaskGaussianLikelihood(3, has_task_noise=False), kron, 3),
    "multitask, task noise": Structure(multitask, lambda: MultitaskGaussianLikelihood(3), kron, 3),
    "multitask, correlated noise": Structure(multitask, lambda: MultitaskGaussianLikelihood(3, rank=1), kron, 3),
    "multitask, singular noise": Structure(
        multitask, lambda: MultitaskGaussianLikelihood(3, rank=3, has_global_noise=False), kron, 3
    ),
    "scaled multitask": Structure(
        lambda net: ScaleKernel(multitask(net)),
        lambda: MultitaskGaussianLikelihood(3),
        lambda k, net, x: k.outputscale * kron(k.base_kernel, net, x),
        3,
    ),
    "coregionalisation": Structure(
        lambda net: LCMKernel([ScaleKernel(NTKKernel(net)), ScaleKernel(NTKKernel(net))], num_tasks=3),
        lambda: MultitaskGaussianLikelihood(3),
        lambda k, net, x: sum(kron(part, net, x) for part in k.covar_module_list),
        3,
    ),
    "independent": Structure(
        lambda net: ScaleKernel(NTKKernel(net, batch_shape=Size([3])), batch_shape=Size([3])),
        lambda: MultitaskGaussianLikelihood(3),
        independent,
        3,
    ),
    "grid": Structure(
        lambda net: GridKernel(ScaleKernel(NTKKernel(net))),
        GaussianLikelihood,
        interpolation,
        1,
        1,
    ),
}


@pytest.mark.parametrize("n", [20, 290])
@pytest.mark.parametrize("name", STRUCTURES)
def test_models(name, n):
    structure, net = STRUCTURES[name], network(inputs=STRUCTURES[name].inputs)
    n = 3 * n if structure.tasks == 1 else n
    x, test_x = data(n, inputs=structure.inputs)[0], data(6, seed=1, inputs=structure.inputs)[0]
    y = torch.randn(n, structure.tasks, dtype=F64).squeeze(-1)
    torch.manual_seed(1)
    kernel = structure.kernel(net).double()
    model = Model(x, y, structure.likelihood(), kernel, structure.tasks, name == "independent")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim():
            parameter.data += 0.3 * torch.rand_like(parameter)
    joint = torch.cat([x, test_x])
    actual = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
    prior = structure.dense(kernel, net, joint)
    mean = model(x).mean.detach()
    rows = n * structure.tasks
    noisy = prior[:rows, :rows] + noise_of(model.likelihood, n)
    expected = references.log_marginal_likelihood((y - mean).reshape(-1), noisy)
    assert_close(actual, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        *(torch.autograd.grad(v, parameters, allow_unused=True, materialize_grads=True) for v in (actual, expected)),
        strict=True,
    ):
        assert_close(a, b, 1e-7)

    with torch.no_grad():
        posterior = model.eval()(test_x)
        cross = prior[rows:, :rows]
        gain = torch.linalg.solve(noisy, cross.mT).mT
        prior_mean = model.forward(test_x).mean
        assert_close(posterior.mean, prior_mean + (gain @ (y - mean).reshape(-1)).reshape(prior_mean.shape), 1e-7)
        covariance = prior[rows:, rows:] - gain @ cross.mT
        assert_close(posterior.covariance_matrix, covariance, 1e-7)
        assert_close(posterior.variance, covariance.diagonal().reshape(prior_mean.shape), 1e-7)


def test_predictions_factorise_what_likelihoods_do():
    net = network()
    x, test_x = data(300)[0], data(6, seed=1)[0]
    likelihood = MultitaskGaussianLikelihood(3)
    model = Model(x, torch.randn(300, 3, dtype=F64), likelihood, multitask(net), 3).eval()
    with torch.no_grad():
        with Work() as first:
            model(test_x).variance  # noqa: B018
        with Work() as second:
            model(test_x).variance  # noqa: B018
    assert first.largest == 300
    assert second.largest <= 6  # the factors are kept


@pytest.mark.parametrize("inducing", [12, 40])
def test_inducing_points(inducing):
    """As GPyTorch's own formulas give it for that approximation, and with its flops."""
    net, (x, y), test_x = network(), data(1200), data(6, seed=1)[0]
    u = x[:inducing].clone()

    def build(base: Kernel) -> Model:
        likelihood = GaussianLikelihood().double()
        return Model(x, y, likelihood, InducingPointKernel(base, u.clone(), likelihood=likelihood))

    model, stock = build(ScaleKernel(NTKKernel(net))), build(ScaleKernel(RBFKernel()))
    work = []
    for each in (model, stock):
        each.train()
        for _ in range(2):
            with Work() as counted:
                ExactMarginalLogLikelihood(each.likelihood, each)(each(x), y).backward()
        each.eval()
        with Work() as predicted, torch.no_grad():
            each(test_x).variance  # noqa: B018
        work.append((counted, predicted))
    for ours, theirs in zip(*work, strict=True):
        assert ours.largest <= max(theirs.largest, inducing)
        assert ours.flops <= 2 * theirs.flops + 60 * 1200 * inducing * 41  # and the network's Jacobian

    with torch.no_grad():
        joint = torch.cat([x, test_x])
        base, noise = model.covar_module.base_kernel, model.likelihood.noise
        k_ju = base.outputscale * references.kernel(net, joint, u)
        prior = k_ju @ torch.linalg.solve(base.outputscale * references.kernel(net, u), k_ju.mT)
        correction = base.outputscale * references.jacobian(net, x).square().sum(-1) - prior.diagonal()[: len(x)]
        noisy = prior[: len(x), : len(x)] + (noise + correction.clamp_min(0)).diag()
        gain = torch.linalg.solve(noisy, prior[len(x) :, : len(x)].mT).mT
        mean = model.forward(test_x).mean + gain @ (y - model.forward(x).mean)
        assert_close(model(test_x).mean, mean, 1e-6)


def test_many_points_predicted_from_inducing_points():
    """More than GPyTorch factorises: their likelihood and samples."""
    net, (x, y), (test_x, test_y) = network(), data(100), data(850, seed=1)
    likelihood = GaussianLikelihood().double()
    kernel = InducingPointKernel(ScaleKernel(NTKKernel(net)), x[:20].clone(), likelihood=likelihood)
    model = Model(x, y, likelihood, kernel).eval()
    with torch.no_grad():
        predicted = likelihood(model(test_x))
        dense = predicted.lazy_covariance_matrix.to_dense()
        expected = torch.distributions.MultivariateNormal(predicted.mean, dense).log_prob(test_y)
        assert_close(predicted.log_prob(test_y), expected)
        samples = predicted.rsample(Size([850]), base_samples=torch.eye(850, dtype=F64)) - predicted.mean
        assert_close(samples.mT @ samples, dense)


def test_gpytorch_refuses_grids_of_kernels_that_are_not_stationary():
    with pytest.raises(RuntimeError, match="must be stationary"):
        GridInterpolationKernel(NTKKernel(network(inputs=1)), grid_size=30, num_dims=1)
