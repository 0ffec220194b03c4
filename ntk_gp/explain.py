"""Which solver a model's training system has, and why."""

from __future__ import annotations

import torch
from gpytorch.models import ExactGP, exact_gp
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy, SGPRPredictionStrategy
from linear_operator.operators import LinearOperator, LowRankRootAddedDiagLinearOperator

from .bridge.prediction_strategies import NTKPredictionStrategy
from .bridge.recognised import contains_ntk
from .operators import NTKAddedDiagLinearOperator
from .operators._densely_solved import DenselySolved
from .operators.ntk_block_linear_operators import NTKBlockDiagLinearOperator, NTKBlockInterleavedLinearOperator
from .operators.ntk_interpolated_linear_operator import NTKInterpolatedLinearOperator
from .operators.ntk_kronecker_linear_operator import NTKKroneckerLinearOperator
from .solvers import SolverReport


def solver_report(model: ExactGP) -> SolverReport:
    """Tells which solver serves the training system of a model, or would if it predicted now, and why.

    Where the model's prior covariance is one neural tangent kernel's K, or that with known features beside it
    (:class:`~ntk_gp.GainKernel`), the report has for every solver about how many flops and bytes it would take, and
    what speaks against it; :class:`ntk_gp.settings.solver` sets another one. Where the matrix is solved in another way
    (a sum with other kernels, one with a structure of its own, or a kernel of GPyTorch's),
    it says so in a sentence. While the noise, one scale and variances of a few features beside it are fitted, marginal
    likelihoods come from the eigenvalues of K where those fit in memory, unless a solver is set.

    Nothing is factorised for the report, and the model stays as it is. The network is evaluated at the training inputs,
    as every prediction needs it.

    :param model: An ExactGP with training data, in train or eval mode.
    :raises TypeError: If the model is none.
    :raises ValueError: If it has no training data.

    Example:
        >>> import gpytorch
        >>> from ntk_gp import NetworkMean, NTKKernel, settings
        >>> class AdaptedGP(gpytorch.models.ExactGP):
        ...     def __init__(self, x, y, network):
        ...         super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        ...         self.mean_module, self.covar_module = NetworkMean(network), NTKKernel(network)
        ...     def forward(self, x):
        ...         return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
        >>> gp = AdaptedGP(torch.randn(200, 2), torch.randn(200), network)
        >>> with settings.memory_budget("1 GB"):
        ...     print(solver_report(gp))
        weight_space would solve K + D with N = 200 rows, P = 41 parameters: exact, with the least flops
          function_space  ... flops     640 kB   ... times the flops
          weight_space    4.4e+05 flops    40.3 kB   taken
          iterative       ... flops    1.28 MB   iterates to a tolerance: taken where nothing exact can serve
          memory budget                       1 GB
    """
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"Expected a gpytorch.models.ExactGP, got {type(model).__name__}. Of a list of models, ask for each "
            "one's report."
        )
    if model.train_inputs is None or model.train_targets is None:
        raise ValueError("The model has no training data, so nothing is solved. Call model.set_train_data() first.")
    with torch.inference_mode(False), torch.no_grad():
        return _report(_strategy(model), model)


def _strategy(model: ExactGP) -> DefaultPredictionStrategy:
    """The one that the model predicts by, or would predict by, made as GPyTorch makes it; the model keeps none."""
    if model.prediction_strategy is not None:
        return model.prediction_strategy
    inputs = list(model.train_inputs)
    prior = super(ExactGP, model).__call__(*inputs)
    return exact_gp.prediction_strategy(
        train_inputs=inputs, train_prior_dist=prior, train_labels=model.train_targets, likelihood=model.likelihood
    )


def _report(strategy: DefaultPredictionStrategy, model: ExactGP) -> SolverReport:
    if not isinstance(strategy, NTKPredictionStrategy):
        return SolverReport(None, _elsewhere(strategy, model))
    matrix = strategy._train_matrix
    if isinstance(matrix, NTKAddedDiagLinearOperator) and matrix._is_positive:
        return matrix.solver_report()
    return SolverReport(None, _sentence(matrix))


def _elsewhere(strategy: DefaultPredictionStrategy, model: ExactGP) -> str:
    if not contains_ntk(model):
        return "The model has no NTKKernel in it: GPyTorch solves, as without this package."
    if isinstance(strategy, SGPRPredictionStrategy):
        return _INDUCING_POINTS
    return f"The model predicts by GPyTorch's {type(strategy).__name__}, which solves in its own way."


def _sentence(matrix: LinearOperator) -> str:
    """How a matrix is solved that is no NTK's K with positive noise alone."""
    for kind, sentence in _SENTENCES.items():
        if isinstance(matrix, kind):
            return sentence
    if isinstance(matrix, DenselySolved):
        return _DENSE if matrix._is_dense else _ITERATED
    return f"An operator of the class {type(matrix).__name__} is solved by its own structure."


_INDUCING_POINTS = "Inducing points: solved by GPyTorch's Woodbury formula, in their number."
_SENTENCES: dict[type[LinearOperator], str] = {
    NTKAddedDiagLinearOperator: "Noise that is not positive: K + D is solved by a dense factor, with jitter.",
    NTKKroneckerLinearOperator: "A Kronecker product (multitask kernel): solved by the eigenvalues of each factor.",
    NTKBlockDiagLinearOperator: "Blocks on a diagonal: each is solved by itself.",
    NTKBlockInterleavedLinearOperator: "Interleaved blocks: each is solved by itself.",
    NTKInterpolatedLinearOperator: "Interpolation from a grid: solved by Woodbury's formula, in the grid's size.",
    LowRankRootAddedDiagLinearOperator: _INDUCING_POINTS,
}
_DENSE = "A sum or product of kernels, or a part of a matrix: solved by one dense Cholesky factor in float64."
_ITERATED = (
    "A sum or product of kernels, or a part of a matrix, too large for one dense factor in "
    "ntk_gp.settings.memory_budget: solved by GPyTorch's conjugate gradients, to ntk_gp.settings.solve_tolerance."
)
