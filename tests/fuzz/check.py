"""A random network in every operation, against Jacobians by plain autograd and dense algebra in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cached_property

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel, adapted_network, draw_functions
from tests import references
from tests.fuzz.blocks import TOKENS
from tests.fuzz.recipe import Recipe

NOISE = 0.1  # of the mean prior variance
# Relative errors of a matrix's norm: of products with the Jacobian, and of what is solved for.
TOLERANCES = {"float64": (1e-9, 1e-7), "float32": (2e-4, 5e-3), "single": (1e-4, 5e-3)}
SLOPE_TOLERANCE = 1e-6  # the reference is a finite difference


class Reference:
    """What is expected, by plain autograd for one row of inputs after the other and dense algebra in float64.

    N = n·C rows for all outputs that take part, point-major.
    """

    def __init__(self, recipe: Recipe):
        self.x, normal = recipe.data()
        self.network = recipe.network().eval()
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.index = slice(None) if recipe.output in (None, "all") else slice(recipe.output, recipe.output + 1)
        self.values, self.jacobian = self.linearized(self.x)
        normal = normal[..., self.index]
        self.outputs = normal.shape[-1]
        self.variances = _variances(self.parameters, recipe)
        self.kernel = (self.jacobian * self.variances) @ self.jacobian.mT
        self.noise = NOISE * float(self.kernel.diagonal(dim1=-2, dim2=-1).mean())
        self.training = recipe.training * self.outputs
        self.targets = self.values[..., : self.training] + normal.flatten(-2) * self.noise**0.5
        self.mean, self.covariance = self.posterior(self.values, self.jacobian)

    def linearized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, (*batch, N), and J, (*batch, N, P)."""
        values, rows = [], []
        for point in x.reshape(-1, x.shape[-1]):
            outputs = self.network(point.clone().unsqueeze(0))[0, self.index]
            values.append(outputs.detach())
            rows += [_gradient(output, [*self.parameters.values()]) for output in outputs]
        stacked = torch.stack(values).reshape(*x.shape[:-2], -1)
        return stacked, torch.stack(rows).reshape(*stacked.shape, -1)

    def posterior(self, values: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """At the rows after the training rows."""
        kernel = (jacobian * self.variances) @ jacobian.mT
        return references.posterior(values, kernel, torch.tensor(self.noise, dtype=torch.float64), self.targets)

    def slope(self, direction: Tensor, step: float = 1e-4) -> Tensor:
        """The derivative of the sum of posterior means and variances, the test inputs moving along a direction.

        By finite differences: what is zero to rounding elsewhere is of second order in the step here.
        """
        return (self._sum(step * direction) - self._sum(-step * direction)) / (2 * step)

    def _sum(self, shift: Tensor) -> Tensor:
        values, jacobian = self.linearized(self.x[..., -shift.shape[-2] :, :] + shift)
        mean, covariance = self.posterior(
            torch.cat([self.values[..., : self.training], values], -1),
            torch.cat([self.jacobian[..., : self.training, :], jacobian], -2),
        )
        return mean.sum() + covariance.diagonal(dim1=-2, dim2=-1).sum()


def _gradient(output: Tensor, parameters: list[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in gradients])


def group_variances(labels: list[str]) -> dict[str, float]:
    """The prior variance of each group, in the order in which the groups first come."""
    return {label: 0.5 + 0.25 * (i % 5) for i, label in enumerate(dict.fromkeys(labels))}


def _label(name: str, groups: str | None) -> str:
    return {None: "", "parameter": name, "layer": name.rpartition(".")[0]}[groups]


def _variances(parameters: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """(P,)."""
    if recipe.groups is None:
        return torch.ones(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    labels = [_label(name, recipe.groups) for name in parameters]
    each = group_variances(labels)
    return torch.cat(
        [
            torch.full((p.numel(),), each[label], dtype=torch.float64)
            for label, p in zip(labels, parameters.values(), strict=True)
        ]
    )


class GP(gpytorch.models.ExactGP):
    """The user's own model: all outputs are tasks, or one is a function."""

    def __init__(self, x: Tensor, y: Tensor, mean: NetworkMean, kernel: NTKKernel, noise: float, tasks: int):
        if tasks:
            likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(tasks, has_task_noise=False)
        else:
            likelihood = gpytorch.likelihoods.GaussianLikelihood()
        likelihood = likelihood.to(x.dtype)
        likelihood.noise = noise
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel
        self.distribution = MultitaskMultivariateNormal if tasks else MultivariateNormal

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.distribution(self.mean_module(x), self.covar_module(x))


class Problem:
    """The package's side of a recipe."""

    def __init__(self, recipe: Recipe, reference: Reference, engine: str | None):
        self.recipe, self.reference = recipe, reference
        self.network: nn.Module = recipe.network().train(recipe.mode == "train")
        self.x = reference.x.to(recipe.dtype)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.options = {} if engine is None else {"engine": engine}

    @cached_property
    def kernel(self) -> NTKKernel:
        kernel = NTKKernel(self.network, output=self.recipe.output, variance_groups=self.recipe.groups, **self.options)
        if self.recipe.groups is not None:
            kernel.variance = torch.tensor([*group_variances([*kernel.network.group_names]).values()]).unsqueeze(0)
        return kernel

    @cached_property
    def mean(self) -> NetworkMean:
        return NetworkMean(self.network, output=self.recipe.output)

    @cached_property
    def gp(self) -> GP:
        tasks = self.reference.outputs if self.recipe.output == "all" else 0
        targets = self.reference.targets.to(self.x.dtype)
        x = self.x[..., : self.recipe.training, :]
        y = targets.unflatten(-1, (-1, tasks)) if tasks else targets
        return GP(x, y, self.mean, self.kernel, self.reference.noise, tasks).eval()

    @property
    def test_x(self) -> Tensor:
        return self.x[..., self.recipe.training :, :]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.recipe.dtype).double()


Pair = tuple[Tensor, Tensor]  # actual, expected
PRODUCTS: dict[str, Callable[[Problem, Reference], Pair]] = {}
SOLVED: dict[str, Callable[[Problem, Reference], Pair]] = {}


def product(function: Callable[[Problem, Reference], Pair]) -> Callable:
    PRODUCTS[function.__name__] = function
    return function


def solved(function: Callable[[Problem, Reference], Pair]) -> Callable:
    SOLVED[function.__name__] = function
    return function


@product
def gram(problem, reference):
    return problem.kernel(problem.x).to_dense(), reference.kernel


@product
def gram_with_one_row(problem, reference):
    first = slice(None, reference.outputs)
    return problem.kernel(problem.x[..., :1, :], problem.x).to_dense(), reference.kernel[..., first, :]


@product
def gram_of_the_first_rows(problem, reference):
    first = slice(None, 5 * reference.outputs)
    return problem.kernel(problem.x[..., :5, :]).to_dense(), reference.kernel[..., first, first]


@product
def diagonal(problem, reference):
    return problem.kernel(problem.x, diag=True), reference.kernel.diagonal(dim1=-2, dim2=-1)


@product
def kernel_product(problem, reference):
    right = problem.randn(reference.kernel.shape[-1], 3)
    return problem.kernel(problem.x).evaluate_kernel() @ right.to(problem.x), reference.kernel @ right


@product
def jacobian_vector_product(problem, reference):
    u = problem.randn(reference.jacobian.shape[-1], 2)
    return problem.kernel.jacobian(problem.x) @ u.to(problem.x), reference.jacobian @ u


@product
def vector_jacobian_product(problem, reference):
    v = problem.randn(reference.jacobian.shape[-2], 2)
    return problem.kernel.jacobian(problem.x).mT @ v.to(problem.x), reference.jacobian.mT @ v


@product
def rows(problem, reference):
    return problem.kernel.jacobian(problem.x).to_dense(), reference.jacobian


@product
def network_mean(problem, reference):
    return problem.mean(problem.x).reshape(reference.values.shape), reference.values


@solved
def posterior_mean(problem, reference):
    return problem.gp(problem.test_x).mean.reshape(reference.mean.shape), reference.mean


@solved
def posterior_covariance(problem, reference):
    return problem.gp(problem.test_x).covariance_matrix, reference.covariance


@solved
def posterior_variances(problem, reference):
    diagonal = problem.gp(problem.test_x).lazy_covariance_matrix.diagonal(dim1=-2, dim2=-1)
    return diagonal, reference.covariance.diagonal(dim1=-2, dim2=-1)


@solved
def drawn_functions(problem, reference):
    """Their values, at the weights that they say they have."""
    functions = draw_functions(problem.gp, 3, generator=problem.generator)
    expected = reference.values + functions.weights @ reference.jacobian.mT
    return functions(problem.x).reshape(expected.shape), expected


@solved
def adapted(problem, reference):
    return adapted_network(problem.gp)(problem.test_x).reshape(reference.mean.shape), reference.mean


def slope(problem: Problem, reference: Reference) -> Pair:
    """Of means and variances in the test inputs, along one direction (tokens are no numbers)."""
    x = problem.test_x.clone().requires_grad_()
    direction = problem.randn(*x.shape)
    direction[..., -TOKENS:] = 0.0
    posterior = problem.gp(x)
    (gradient,) = torch.autograd.grad(posterior.mean.sum() + posterior.variance.sum(), x)
    # Next to the gradient's own size: along a direction it may vanish.
    along = torch.stack([(gradient * direction).sum(), gradient.norm() * direction.norm()])
    return along, torch.stack([reference.slope(direction), along[1].detach()])


WITHOUT_BATCHES = {"drawn_functions", "adapted"}  # refused, as documented


def failures(recipe: Recipe, reference: Reference, engine: str | None = None) -> Iterator[tuple[str, str]]:
    """Every operation that goes wrong, and how; in an order that is drawn, since plans come from the first inputs."""
    operations = [*PRODUCTS.items(), *SOLVED.items()]
    if recipe.has_slope:
        operations.append(("slope", slope))
    random.Random(recipe.seed).shuffle(operations)
    tolerances = TOLERANCES["float32" if recipe.dtype == torch.float32 else "single" if recipe.single else "float64"]
    problem = Problem(recipe, reference, engine)
    x, state = problem.x.clone(), _copied_state(problem.network)
    for name, operation in operations:
        if recipe.batch and name in WITHOUT_BATCHES:
            continue
        try:
            actual, expected = operation(problem, reference)
        except Exception as error:
            if not (recipe.may_refuse and isinstance(error, (ValueError, TypeError)) and str(error)):
                yield name, f"{type(error).__name__}: {error}"
            continue
        tolerance = SLOPE_TOLERANCE if name == "slope" else tolerances[name in SOLVED]
        if wrong := _difference(actual, expected, tolerance):
            yield name, wrong
    if not torch.equal(x, problem.x):
        yield "inputs", "the user's inputs were changed"
    modes_kept = all(module.training == (recipe.mode == "train") for module in problem.network.modules())
    if not (modes_kept and all(map(_equal, state, _copied_state(problem.network)))):
        yield "network", "the user's network was changed"


def _difference(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = float((actual.detach().double() - expected).norm() / expected.norm().clamp(min=1e-300))
    return None if error <= tolerance else f"relative error {error:.2g}, at most {tolerance:.0e} expected"


def _copied_state(network: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in network.state_dict().values()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to_dense(), b.to_dense())
