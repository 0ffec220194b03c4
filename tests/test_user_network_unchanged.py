"""No public call changes anything of the user's network, or torch's random state and switches."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gpytorch
import pytest
import torch
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.stock import stock


def hook(*args: object) -> None:
    """Changes nothing."""


def make_network() -> nn.Module:
    """One with something of everything: buffers, dropout, a frozen part, gradients, hooks, in train mode."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(inplace=True), nn.Linear(8, 1),
    )  # fmt: skip
    network.note = torch.ones(2)  # a tensor that is neither parameter nor buffer
    network[0].weight.requires_grad_(False)
    network(torch.randn(16, 3)).sum().backward()
    network[2].eval()
    network[0].register_forward_hook(hook)
    network[6].register_forward_pre_hook(hook)
    network[6].register_full_backward_hook(hook)
    network[6].bias.register_hook(hook)
    return network


def state(network: nn.Module) -> dict:
    """Everything about a network that somebody could notice."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers()), "note": network.note}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "tensors": {name: (id(t), t.data_ptr(), t._version, t.dtype, t.device) for name, t in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "tensor hooks": {name: len(tensor._backward_hooks or {}) for name, tensor in tensors.items()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "hooks": {name: [list(getattr(m, kind)) for kind in hooks] for name, m in network.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in network.named_modules()},
        "modules": {name: id(module) for name, module in network.named_modules()},
    }


def surroundings() -> dict:
    return {
        "random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention backends": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "mkldnn": torch._C._get_mkldnn_enabled(),
    }


def assert_same(before: object, after: object, path: str = "") -> None:
    if isinstance(before, Tensor):
        assert isinstance(after, Tensor) and torch.equal(before, after), path
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            assert_same(before[key], after[key], f"{path}/{key}")
    else:
        assert before == after, f"{path}: {before} became {after}"


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    network_before, surroundings_before = state(network), surroundings()
    yield
    assert_same(network_before, state(network))
    assert_same(surroundings_before, surroundings())


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, variance_groups="layer"))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def fit(network: nn.Module, x: Tensor) -> AdaptedGP:
    model = AdaptedGP(x, x.sum(-1), network)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-mll(model(x), x.sum(-1))).backward()
        optimizer.step()
    return model


def predict(network: nn.Module, x: Tensor, **flags: bool) -> None:
    model = AdaptedGP(x, x.sum(-1), network).eval()
    with (
        gpytorch.settings.fast_pred_var(flags.get("love", False)),
        gpytorch.settings.max_cholesky_size(1 if flags.get("iterative") else stock(800)),
    ):
        prediction = model.likelihood(model(x + 0.1))
        _ = prediction.mean, prediction.variance, prediction.covariance_matrix


def input_gradients(network: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    kernel = NTKKernel(network)
    (kernel(x).to_dense().sum() + (kernel(x) @ torch.ones(len(x), 1)).sum() + NetworkMean(network)(x).sum()).backward()


def reload(network: nn.Module, x: Tensor) -> None:
    kernel = NTKKernel(network)
    kernel.load_state_dict({name: 2 * tensor for name, tensor in kernel.state_dict().items()})
    kernel(x).to_dense()


def linearize_again(network: nn.Module, x: Tensor) -> None:
    for module in (NTKKernel(network), NetworkMean(network)):
        module(x)
        module.linearize(network)
        module(x)


def convert(network: nn.Module, x: Tensor) -> None:
    for module in (NTKKernel(network).double(), NetworkMean(network).half()):
        module(x)
        module(x.double())


def small_budget(network: nn.Module, x: Tensor) -> None:
    with ntk_gp.settings.memory_budget(1):
        NTKKernel(network)(x).to_dense()


def add_fantasies(network: nn.Module, x: Tensor) -> None:
    model = AdaptedGP(x, x.sum(-1), network).eval()
    model(x)
    model.get_fantasy_model(x[:2] + 1, x[:2].sum(-1))(x)


def train_everything(network: nn.Module, x: Tensor) -> None:
    model = AdaptedGP(x, x.sum(-1), network)
    model.requires_grad_(True)
    model.train()
    model.zero_grad()
    model.covar_module(x).to_dense().sum().backward()


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "construct": lambda network, x: (NTKKernel(network), NetworkMean(network)),
    "select by pattern": lambda network, x: NTKKernel(network, parameters="*.bias")(x).to_dense(),
    "select by predicate": lambda network, x: NTKKernel(network, parameters=lambda name, p: p.dim() == 2)(x).to_dense(),
    "mean": lambda network, x: NetworkMean(network)(x),
    "dense": lambda network, x: NTKKernel(network)(x).to_dense(),
    "other dtype": lambda network, x: NTKKernel(network)(x.double()).to_dense(),
    "diagonal": lambda network, x: NTKKernel(network)(x, diag=True),
    "product": lambda network, x: NTKKernel(network)(x) @ torch.ones(len(x), 1),
    "entries": lambda network, x: NTKKernel(network)(x).evaluate_kernel()[torch.tensor([0, 1]), torch.tensor([1, 2])],
    "jacobian": lambda network, x: NTKKernel(network).jacobian(x).to_dense(),
    "jacobian product": lambda network, x: NTKKernel(network).jacobian(x).mT @ torch.ones(len(x), 1),
    "input gradients": input_gradients,
    "inference mode": lambda network, x: torch.inference_mode()(lambda: NTKKernel(network)(x.clone()).to_dense())(),
    "small budget": small_budget,
    "fit": fit,
    "predict": predict,
    "predict by CG": lambda network, x: predict(network, x, iterative=True),
    "predict by LOVE": lambda network, x: predict(network, x, iterative=True, love=True),
    "fantasies": add_fantasies,
    "copy": lambda network, x: copy.deepcopy(NTKKernel(network))(x).to_dense(),
    "load_state_dict": reload,
    "linearize": linearize_again,
    "conversion": convert,
    "training mode and gradients": train_everything,
}


@pytest.mark.parametrize("name", CALLS)
def test_unchanged(name):
    network = make_network()
    x = torch.randn(6, 3)
    with unchanged(network):
        CALLS[name](network, x)


def test_unchanged_by_errors():
    network = make_network()
    x = torch.randn(5, 2)
    with unchanged(network), pytest.raises(ValueError):
        NTKKernel(network)(x).to_dense()


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network[6].weight.data.add_(1.0),
        lambda network: setattr(network[6], "bias", nn.Parameter(torch.ones(1))),
        lambda network: network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()}),
        lambda network: network.double(),
        lambda network: network.eval(),
        lambda network: network.requires_grad_(False),
        lambda network: network[1].running_mean.add_(1.0),
        lambda network: network.pop(6),
        lambda network: network.note.zero_(),
        lambda network: network[6].register_forward_hook(lambda module, args, output: output + 1),
    ],
)
def test_the_kernel_is_not_changed_by_the_network(change):
    network = make_network()
    kernel, mean, x = NTKKernel(network), NetworkMean(network), torch.randn(6, 3)
    expected = kernel(x).to_dense(), mean(x)
    fresh = NTKKernel(network), NetworkMean(network)
    change(network)
    assert torch.equal(kernel(x).to_dense(), expected[0])
    assert torch.equal(mean(x), expected[1])
    assert torch.equal(fresh[0](x).to_dense(), expected[0])
    assert torch.equal(fresh[1](x), expected[1])


def test_hooks_that_change_the_output_belong_to_the_function():
    """A forward hook is part of what the network computes; the snapshot keeps those of its time."""
    network = nn.Linear(2, 1)
    network.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(4, 2)
    assert torch.equal(NetworkMean(network)(x), network(x).squeeze(-1).detach())
    torch.testing.assert_close(NTKKernel(network)(x).to_dense(), 4 * (x @ x.mT + 1))
