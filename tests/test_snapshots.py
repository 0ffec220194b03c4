"""Networks that change themselves: in eval(), at a call, or by the user's hand. What is taken is what they are in eval
mode, every call finds it as it was taken, and an edit of it is noticed."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable

import gpytorch
import numpy as np
import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.network.fingerprint import Fingerprint

ENGINES = ["structured", "autodiff"]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def explicit(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """J and f of a network in eval mode, row by row, by autograd; a new copy for each row."""
    rows, values = [], []
    for row in x:
        fresh = copy.deepcopy(network).eval()
        parameters = [parameter for parameter in fresh.parameters() if parameter.requires_grad]
        out = fresh(row[None].clone()).reshape(())
        grads = torch.autograd.grad(out, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
        values.append(out.detach())
    return torch.stack(rows), torch.stack(values)


class LoRALinear(nn.Linear):
    """Merges its adapters into its weight in eval mode, as adapter libraries do."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)
        self.a, self.b = nn.Parameter(torch.randn(2, d_in)), nn.Parameter(torch.randn(d_out, 2))
        self.merged = False

    def train(self, mode: bool = True) -> LoRALinear:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.detach() @ self.a.detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Standardised(nn.Linear):
    """Keeps the weight that it computes at its first call in eval mode."""

    def __init__(self, d_in: int, d_out: int, place: str):
        super().__init__(d_in, d_out)
        self.place = place
        self.attribute: Tensor | None = None
        self.dictionary: dict[torch.dtype, Tensor] = {}
        self.sequence: list[Tensor] = []
        self.queue: deque[Tensor] = deque(maxlen=1)
        self.inside = Holder()

    def compute(self) -> Tensor:
        return (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True)

    def cached(self) -> Tensor:
        if self.place == "attribute":
            if self.attribute is None:
                self.attribute = self.compute()
            return self.attribute
        if self.place == "object":
            if self.inside.value is None:
                self.inside.value = self.compute()
            return self.inside.value
        if self.place == "dictionary":
            return self.dictionary.setdefault(self.weight.dtype, self.compute())
        kept = self.sequence if self.place == "list" else self.queue
        if not kept:
            kept.append(self.compute())
        return kept[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.compute() if self.training else self.cached(), self.bias)


class Holder:
    value: Tensor | None = None


class Stores(nn.Module):
    """Keeps its activations to be looked at, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.number, self.log = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.first(x))
        self.calls += 1
        self.number += 1
        self.log.append(self.features)
        return self.second(self.features) / self.calls / self.number


class Writes(nn.Module):
    """Writes into its input, in one way or another."""

    def __init__(self, write: Callable[[Tensor], Tensor]):
        super().__init__()
        self.write, self.layers = write, nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.write(x))


def standardised(place: str) -> nn.Module:
    return nn.Sequential(Standardised(3, 8, place), nn.Tanh(), nn.Linear(8, 1))


def set_first_column(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "merged adapters": lambda: nn.Sequential(LoRALinear(3, 8), nn.Tanh(), nn.Linear(8, 1)),
    **{
        f"cached in a {place}": lambda place=place: standardised(place)
        for place in ("attribute", "dictionary", "list", "queue", "object")
    },
    "stored activations": Stores,
    "relu in place": lambda: Writes(torch.relu_),
    "mean subtracted in place": lambda: Writes(lambda x: x.sub_(0.5)),
    "columns set": lambda: Writes(set_first_column),
    "renormalised": lambda: Renormalised(),
}


class Renormalised(nn.Module):
    """Its lookups shorten long rows of the table in place."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table((x[:, 0].abs() * 2).long().clamp(max=4)) + x))


def network_of(name: str, called: bool) -> nn.Module:
    """In train mode, and called before or not."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    if called:
        network.eval()(randn(2, 3))
        network.train()
    return network


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_and_mean_are_those_of_the_network_in_eval_mode(name, engine, called):
    network = network_of(name, called)
    if name == "stored activations":
        network.calls.zero_()
        network.number = 0
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = randn(9, 3)
    given = x.clone()
    kernel, mean = NTKKernel(network, engine=engine), NetworkMean(network)
    fresh = copy_without_caches(network)
    J, f = explicit(fresh, given)
    for _ in range(2):  # what a call leaves behind must not reach the next
        torch.testing.assert_close(mean(x), f, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(kernel(x).to_dense(), J @ J.T, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(kernel.jacobian(x) @ torch.eye(J.shape[1]).double(), J, rtol=1e-11, atol=1e-12)
    assert torch.equal(x, given)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert network.training


def copy_without_caches(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, Standardised):
            module.attribute = module.inside.value = None
            module.dictionary.clear(), module.sequence.clear(), module.queue.clear()
        if isinstance(module, Stores):
            module.log.clear()
            module.__dict__.pop("features", None)
    return copy.deepcopy(network)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_in_float32_go_through_both_precisions(name, engine):
    """The Jacobian of training inputs is taken in float64, the mean in float32: two copies of one network."""
    network = network_of(name, called=True).float()
    if name == "stored activations":
        network.calls.zero_()
        network.number = 0
    x, y, z = torch.randn(12, 3), torch.randn(12), torch.randn(4, 3)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    likelihood.noise = 0.1

    class Model(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = NetworkMean(network), NTKKernel(network, engine=engine)

        def forward(self, inputs: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))

    with torch.no_grad():
        prediction = Model().eval()(z)
    J, f = explicit(copy_without_caches(network).double(), torch.cat([x, z]).double())
    A, B = J[:12], J[12:]
    system = A @ A.T + 0.1 * torch.eye(12, dtype=torch.float64)
    mean = f[12:] + B @ A.T @ torch.linalg.solve(system, y.double() - f[:12])
    variance = (B @ B.T - B @ A.T @ torch.linalg.solve(system, A @ B.T)).diagonal()
    torch.testing.assert_close(prediction.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.variance.double(), variance, rtol=1e-3, atol=1e-6)


class TestWhatCannotBeServed:
    def test_a_weight_kept_in_a_global_variable(self):
        kept: dict[str, Tensor] = {}

        class Global(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, kept.setdefault("weight", 2 * self.weight), self.bias)

        kernel = NTKKernel(nn.Sequential(Global(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
        with pytest.raises(ValueError, match=r"keeps something .* for later calls.* \(0.weight\). Compute it anew"):
            kernel(randn(4, 3)).to_dense()

    def test_an_attribute_that_was_left_out_is_named(self):
        class Needs(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.doubled, self.bias)

        network = Needs(3, 1).double()
        network.doubled = 2 * network.weight
        with pytest.raises(ValueError, match=r"Its attributes doubled were computed from its parameters"):
            NetworkMean(network)(randn(4, 3))

    def test_a_constant_that_may_have_been_a_weight_is_named(self):
        class Detached(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.doubled, self.bias)

        network = Detached(3, 1).double()
        network.doubled = 2 * network.weight.detach()
        with pytest.warns(UserWarning, match=r"does not depend on its parameters weight, and it holds .*: doubled"):
            NTKKernel(network)(randn(4, 3)).to_dense()

    def test_writes_that_begin_later_are_refused(self):
        class Late(nn.Linear):
            def __init__(self):
                super().__init__(3, 1)
                self.register_buffer("shift", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                if x[0, 0] > 1:
                    self.shift += 1.0
                return super().forward(x) + self.shift

        mean = NetworkMean(Late().double())
        mean(torch.zeros(4, 3).double())
        with pytest.raises(RuntimeError, match="wrote to its tensors shift at these inputs"):
            mean(2 + torch.zeros(4, 3).double())


EDITS: dict[str, Callable[[Tensor], object]] = {
    "data.mul_": lambda weight: weight.data.mul_(2.0),
    "one element of data": lambda weight: weight.data.view(-1)[-1].add_(1e-9),
    "numpy": lambda weight: np.multiply(weight.numpy(), 2.0, out=weight.numpy()),
    "rows exchanged": lambda weight: weight.data.copy_(weight.data.flip(0)),
    "columns exchanged": lambda weight: weight.data.copy_(weight.data.flip(1)),
    "new memory": lambda weight: setattr(weight, "data", weight.data * 2.0),
    "in place": lambda weight: weight.mul_(2.0),
}


@pytest.mark.parametrize("width", [4, 512], ids=["small", "large"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_snapshot_are_noticed(edit, width):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1)).double()
    x = randn(6, 8)
    kernel, mean = NTKKernel(network), NetworkMean(copy.deepcopy(network))  # of one network, they share their tensors
    kernel(x).to_dense(), mean(x)
    edited = copy.deepcopy(network).requires_grad_(False)
    EDITS[edit](edited[0].weight)
    edited.requires_grad_()
    for module in (kernel, mean):
        EDITS[edit](module.network.tensors.get_buffer("0.weight"))
    J, f = explicit(edited, x)
    torch.testing.assert_close(kernel(x).to_dense(), J @ J.T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mean(x), f, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (3001,), (60, 70)])
def test_every_element_counts(dtype, shape):
    tensor = torch.rand(shape).to(dtype)
    fingerprint = Fingerprint()
    seen = {fingerprint.number([tensor], thorough=True)}
    assert fingerprint.number([tensor], thorough=True) in seen
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        element = tensor.data.view(-1)[place]
        element.copy_(~element if dtype == torch.bool else element + 1)
        assert fingerprint.number([tensor]) in seen  # no trace of it
        number = fingerprint.number([tensor], thorough=True)
        assert number not in seen
        seen.add(number)


@pytest.mark.parametrize("layout", ["strided", "coo", "csr"])
def test_other_layouts_are_looked_at(layout):
    dense = torch.eye(4) + torch.ones(4, 4).triu()
    tensor = {"strided": dense.mT[:, ::2], "coo": dense.to_sparse().coalesce(), "csr": dense.to_sparse_csr()}[layout]
    fingerprint = Fingerprint()
    first = fingerprint.number([tensor], thorough=True)
    values = tensor if layout == "strided" else tensor.values()
    values.data.mul_(2.0)
    assert fingerprint.number([tensor], thorough=True) != first


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.head(self.recurrent(x[..., None], state)[0][:, -1])


class StateInside(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, torch.zeros(1, len(x), 3))


class CastInside(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class CastOutput(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [StateInside, CastInside, CastOutput])
def test_a_precision_fixed_inside_is_the_one_computed_in(kind, engine):
    torch.manual_seed(0)
    network, x = kind(), torch.randn(8, 4)
    plain = Recurrent().double()
    plain.load_state_dict(network.state_dict())
    J, f = explicit(plain, x.double())
    kernel, mean = NTKKernel(network, engine=engine), NetworkMean(network)
    torch.testing.assert_close(kernel(x).to_dense().double(), J @ J.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean(x).double(), f, rtol=1e-5, atol=1e-6)
    with pytest.warns(NumericalWarning, match=r"computes in torch.float32.*dtype=x.dtype"):
        exact = kernel(x.double()).to_dense()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, J @ J.T, rtol=1e-4, atol=1e-5)


def test_more_precision_inside_is_no_loss():
    class Double(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.double(), self.weight.double(), self.bias.double())

    network, x = Double(3, 1), torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        value = NetworkMean(network)(x)
    torch.testing.assert_close(value, network(x).squeeze(-1).float().detach())


def test_a_frozen_complex_parameter_is_a_constant():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.frequencies = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64), requires_grad=False)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.to(self.frequencies.dtype) @ self.frequencies).abs())

    network, x = Fourier(), torch.randn(5, 3)
    features = (x.double().to(torch.complex128) @ network.frequencies.to(torch.complex128)).abs()
    for inputs in (x, x.double()):
        gram = NTKKernel(network)(inputs).to_dense()
        torch.testing.assert_close(gram.double(), features @ features.T + 1, rtol=1e-5, atol=1e-5)
        assert NetworkMean(network)(inputs).dtype == inputs.dtype
