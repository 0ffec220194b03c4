"""Sums of a neural tangent kernel and kernels of known features, as shared data, with their dense form."""

from __future__ import annotations

import torch
from gpytorch.kernels import ConstantKernel, Kernel, LinearKernel, ScaleKernel
from torch import Tensor, nn

from ntk_gp import GainKernel, NTKKernel
from ntk_gp.bridge.feature_sums import summands
from tests import references

# Kernels to add to an NTK, each made for a network with 3 inputs and one output.
KNOWN = {
    "gain": lambda net: GainKernel(net),
    "scaled gain": lambda net: ScaleKernel(GainKernel(net)),
    "constant": lambda net: ConstantKernel(),
    "scaled constant": lambda net: ScaleKernel(ConstantKernel()),
    "linear": lambda net: LinearKernel(),
    "ard": lambda net: ScaleKernel(LinearKernel(ard_num_dims=3)),
}

# Sums, each of a scaled NTK and these; the NTK is not always first.
SUMS = {
    "gain": ("gain",),
    "constant": ("constant",),
    "linear": ("ard",),
    "all": ("scaled gain", "constant", "ard"),
    "two of a kind": ("gain", "scaled gain", "scaled constant", "linear"),
}


def sum_kernel(net: nn.Module, names: tuple[str, ...], groups: str | None = None, seed: int = 0) -> Kernel:
    """The sum, in float64, with hyperparameters drawn at random."""
    kernel = KNOWN[names[0]](net) + ScaleKernel(NTKKernel(net, variance_groups=groups))
    for name in names[1:]:
        kernel = kernel + KNOWN[name](net)
    kernel = kernel.double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in kernel.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return kernel


def dense(kernel: Kernel, net: nn.Module, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """The kernel matrix from an explicit Jacobian and the network's values; differentiable in the hyperparameters."""
    x2 = x1 if x2 is None else x2
    return sum(_dense(part.kernel, part.scales, net, x1, x2) for part in summands(kernel))


def _dense(kernel: Kernel, scales: tuple, net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    if isinstance(kernel, NTKKernel):
        jacobian = references.jacobian(net, x1)
        matrix = (jacobian * by_parameter(kernel, net)) @ references.jacobian(net, x2).mT
    elif isinstance(kernel, GainKernel):
        matrix = gain(kernel, net(x1), net(x2))
    elif isinstance(kernel, ConstantKernel):
        matrix = kernel.constant.unsqueeze(-1)
    else:
        matrix = (x1 * kernel.variance) @ x2.mT
    for scale in scales:
        matrix = matrix * scale.outputscale[..., None, None]
    return matrix.expand(*matrix.shape[:-2], *_rows(net, x1, x2))


def _rows(net: nn.Module, x1: Tensor, x2: Tensor) -> tuple[int, int]:
    outputs = net(x1[..., :1, :]).shape[-1]
    return x1.shape[-2] * outputs, x2.shape[-2] * outputs


def gain(kernel: GainKernel, values1: Tensor, values2: Tensor) -> Tensor:
    """s_a f fᵀ + s_b for each output by itself: (*batch, n, C) to (*batch, n·C, n'·C)."""
    outputs = values1.shape[-1]
    products = torch.einsum("...ic,...jd->...icjd", values1, values2)
    eye = torch.eye(outputs, dtype=values1.dtype)[:, None, :]
    shape = (*products.shape[:-4], values1.shape[-2] * outputs, values2.shape[-2] * outputs)
    blocks = kernel.gain_variance[..., None, None] * products + kernel.offset_variance[..., None, None]
    return (blocks * eye).reshape(*blocks.shape[:-4], *shape[-2:])


def by_parameter(kernel: NTKKernel, net: nn.Module) -> Tensor:
    """The prior variance of each parameter, (P,), or one for all, differentiably."""
    names = [name for name, _ in net.named_parameters()]
    groups = kernel.network.group_names
    if len(groups) == 1:
        return kernel.variance  # (*batch, 1, 1)
    index = [groups.index(name if name in groups else name.rpartition(".")[0]) for name in names]
    pieces = [kernel.variance.reshape(-1)[i].expand(p.numel()) for i, p in zip(index, net.parameters(), strict=True)]
    return torch.cat(pieces)
