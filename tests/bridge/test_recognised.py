"""What has a neural tangent kernel in it, and what has not: kernels, models and matrices, evaluated or not."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ProductKernel, RBFKernel, ScaleKernel
from linear_operator import to_linear_operator
from linear_operator.operators import (
    BlockDiagLinearOperator,
    ConstantDiagLinearOperator,
    KroneckerProductLinearOperator,
)

from ntk_gp import NTKKernel
from ntk_gp.bridge.exactly_solved import exactly_solved
from ntk_gp.bridge.recognised import contains_ntk, named_modules_of, networks_of
from ntk_gp.network import FrozenNetwork
from tests.adapted import AdaptedGP, data, network

KERNELS = {
    "plain": lambda k: k,
    "scaled": ScaleKernel,
    "sum": lambda k: RBFKernel() + k,
    "product": lambda k: ProductKernel(RBFKernel(), k),
    "nested": lambda k: ScaleKernel(AdditiveKernel(MaternKernel(), ScaleKernel(k) * RBFKernel())),
}
MATRICES = {
    "noisy": lambda k: k + ConstantDiagLinearOperator(torch.ones(1, dtype=k.dtype), diag_shape=k.shape[-1]),
    "sum": lambda k: k + to_linear_operator(torch.eye(k.shape[-1], dtype=k.dtype)),
    "product": lambda k: k * to_linear_operator(torch.eye(k.shape[-1], dtype=k.dtype)),
    "multiple": lambda k: k * 2.0,
    "slice": lambda k: k[:3, 1:],
    "transpose": lambda k: k.mT,
    "repeated": lambda k: k.repeat(2, 1, 1),
    "blocks": lambda k: BlockDiagLinearOperator(k.repeat(2, 1, 1)),
    "kronecker": lambda k: KroneckerProductLinearOperator(to_linear_operator(torch.eye(2, dtype=k.dtype)), k),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_and_models(name):
    net, (x, y) = network(), data(5)
    for kernel, expected in ((NTKKernel(net), True), (RBFKernel(), False)):
        kernel = KERNELS[name](kernel).double()
        model = AdaptedGP(x, y, net, kernel)
        assert contains_ntk(kernel) == contains_ntk(model) == expected
        for matrix in (kernel(x), kernel(x).evaluate_kernel(), model.forward(x).lazy_covariance_matrix):
            assert contains_ntk(matrix) == expected


@pytest.mark.parametrize("name", KERNELS)
def test_modules_and_kernels_within_are_torchs_and_gpytorchs(name):
    for kernel in (NTKKernel(network()), RBFKernel()):
        whole = KERNELS[name](kernel)
        model = AdaptedGP(*data(5), network(), AdditiveKernel(whole, kernel))  # one kernel twice
        within = {id(module): inner for inner, module in model.named_modules() if isinstance(module, FrozenNetwork)}
        outside = [
            (name, module)
            for name, module in model.named_modules()
            if not any(name.startswith(f"{snapshot}.") for snapshot in within.values())
        ]
        assert within and list(named_modules_of(model)) == outside
        kernels = [(name, module) for name, module in whole.named_modules() if name and isinstance(module, Kernel)]
        assert [*whole.named_sub_kernels()] == ([] if whole is kernel else kernels)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("evaluated", [True, False])
def test_matrices(name, evaluated):
    x = data(5)[0]
    for kernel, expected in ((NTKKernel(network()), True), (RBFKernel(), False)):
        matrix = kernel.double()(x)
        matrix = MATRICES[name](matrix.evaluate_kernel() if evaluated else matrix)
        assert contains_ntk(matrix) == expected


@pytest.mark.parametrize("name", [name for name in MATRICES if name not in ("slice", "transpose")])
def test_matrices_that_solve_exactly(name):
    matrix = MATRICES[name](NTKKernel(network())(data(5)[0]))
    assert contains_ntk(exactly_solved(matrix))


def test_networks_of_a_sum():
    x = data(5)[0]
    first, second = (NTKKernel(net) for net in (network(), torch.nn.Linear(3, 1).double()))
    one, other = (networks_of(kernel(x).evaluate_kernel()) for kernel in (first, second))
    assert len(one) == len(other) == 1
    assert one != other
    assert networks_of((first + second * first)(x).evaluate_kernel()) == one | other
    assert networks_of(RBFKernel()(x).evaluate_kernel()) == set()
