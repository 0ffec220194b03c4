"""Parameters that are chosen by the name of a set, and grouped by patterns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ntk_gp import LinearizedNetwork, NTKKernel
from ntk_gp.testing import explicit_jacobian


def inputs(n: int = 5, d: int = 3) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class RMSNorm(nn.Module):
    """As language models have their own."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class LlamaRMSNorm(RMSNorm):
    pass


class PreNorm(nn.Module):
    """A module around a layer, called a norm, without parameters of its own."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(6, 1), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class WithAuxiliaryHead(HeadFirst):
    """Its last call has no influence on the output."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        output = self.head(hidden)
        self.auxiliary(hidden)
        return output


class Tied(nn.Module):
    """The last layer's weight is the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x)))).sum(-1)


class WithToken(nn.Module):
    """Has a weight of its own, as vision transformers have their class token, and layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.body, self.head = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) + self.token))


class LoRA(nn.Module):
    """A layer around another one, with adapters, named as PEFT does."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Functional(nn.Module):
    """The output is computed by a weight of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(3, 6), nn.Parameter(torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) @ self.weight


class Head(nn.Linear):
    """Calls a layer of its own, and uses its weight after that."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)
        self.first = nn.Linear(d_in, d_in)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.first(x)))


def normalised() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), PreNorm(nn.Linear(6, 6), 6), LlamaRMSNorm(6), nn.Linear(6, 1)
    )


NORMS = ["1.*", "3.norm.*", "4.*"]
BIASES = ["0.bias", "1.bias", "3.norm.bias", "3.layer.bias", "5.bias"]


@pytest.mark.parametrize(
    ("build", "chosen", "patterns"),
    [
        (normalised, "last_layer", "5.*"),
        (normalised, "norm", NORMS),
        (normalised, "bias", BIASES),
        (normalised, ["last_layer", "norm"], [*NORMS, "5.*"]),
        (normalised, ["norm", "0.weight", "bias"], [*NORMS, *BIASES, "0.weight"]),
        (HeadFirst, "last_layer", "head.*"),
        (HeadFirst, ["last_layer", "body.bias"], ["head.*", "body.bias"]),
        (WithAuxiliaryHead, "last_layer", "head.*"),
        (WithToken, "last_layer", "head.*"),
        (Tied, "last_layer", ["embed.weight", "head.bias"]),
        (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), Head(6, 1)), "last_layer", "2.*"),
        (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), LoRA(nn.Linear(6, 1))), "*lora*", "2.lora_?.default.weight"),
        (
            lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 1))),
            "last_layer",
            "2.*",
        ),
        (lambda: nn.Linear(3, 1), "bias", "bias"),
    ],
    ids=str,
)
def test_jacobian_of_sets(build, chosen, patterns):
    """The kernel is that of the parameters that patterns, written out, choose; however the network was frozen."""
    torch.manual_seed(0)
    network, x = build().double().eval().requires_grad_(False), inputs()
    kernel = NTKKernel(network, parameters=chosen)
    jacobian = explicit_jacobian(network, x, parameters=patterns)
    torch.testing.assert_close(kernel(x).to_dense(), jacobian @ jacobian.mT, rtol=1e-10, atol=1e-12)
    copied = pickle.loads(pickle.dumps(kernel)) if "<" not in str(build) else copy.deepcopy(kernel)
    torch.testing.assert_close(copied(x).to_dense(), jacobian @ jacobian.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "chosen", "message"),
    [
        (nn.Linear(3, 1), "last_layer", r'no layer within it that has a weight \(parameters="\*" takes all of it\)'),
        (nn.Sequential(nn.Linear(3, 1, bias=False)), ["0.*", "bias"], r"\['bias'\] match no parameter. It has no bias"),
        (nn.Sequential(nn.Linear(3, 1)), "norm", "no normalisation with affine parameters. The network has: 0.weight"),
    ],
)
def test_there_is_no_such_set(network, chosen, message):
    with pytest.raises(ValueError, match=message):
        NTKKernel(network, parameters=chosen)


def test_a_weight_of_the_network_itself_is_last():
    kernel = NTKKernel(Functional().double(), parameters="last_layer")
    with pytest.raises(ValueError, match=r"uses weights of its own after it.*has: weight, body.weight"):
        kernel(inputs()).to_dense()


def test_names_are_exact():
    """`"norm"` is the set; `"norm*"` is a pattern, and matches a parameter that is called so."""
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    network.register_parameter("norms", nn.Parameter(torch.ones(2)))
    assert NTKKernel(network, parameters="norm").network.parameter_names == ("1.weight", "1.bias")
    assert NTKKernel(network, parameters="norm*").network.parameter_names == ("norms",)


def test_kernels_before_and_after_the_first_inputs_are_of_one_layer():
    network, x = HeadFirst().double(), inputs()
    first, second = (NTKKernel(network, parameters="last_layer") for _ in range(2))
    expected = first(x).to_dense()
    third = NTKKernel(network, parameters="last_layer")
    for kernel in (second, third):
        torch.testing.assert_close(kernel(x).to_dense(), expected)
        assert kernel.network.parameter_names == ("head.weight", "head.bias")
    first.linearize(network)
    torch.testing.assert_close(first(x).to_dense(), expected)


def test_what_was_made_for_another_layer_says_so():
    served = LinearizedNetwork(HeadFirst().double(), parameters="last_layer")
    with pytest.raises(ValueError, match=r"last layer is 'head', .* 'body' was registered last.*\"head.\*\""):
        served(inputs())
    grouped = NTKKernel(HeadFirst().double(), variance_groups={"last_layer": "last"})
    with pytest.raises(ValueError, match=r"last layer is 'head'"):
        grouped(inputs()).to_dense()


class Watched(nn.Module):
    """Counts the rows for which something that requires gradients is handed on, or gradients come back."""

    forward_rows = 0
    backward_rows = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            Watched.forward_rows += len(x)
            x.register_hook(self.count)
        return x.clone()

    @staticmethod
    def count(gradient: Tensor) -> None:
        Watched.backward_rows += len(gradient)


@pytest.mark.parametrize(("chosen", "is_below"), [("last_layer", False), ("norm", False), ("*", True)])
def test_nothing_below_the_lowest_selected_layer_is_differentiated(chosen, is_below):
    network = nn.Sequential(nn.Linear(3, 4), Watched(), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    kernel, x = NTKKernel(network, parameters=chosen, engine="structured"), inputs(900)
    kernel(x).to_dense()  # tried at a few inputs
    Watched.forward_rows = Watched.backward_rows = 0
    kernel(x + 1).to_dense()
    assert (Watched.forward_rows > 0, Watched.backward_rows > 0) == (is_below, is_below)


class TestGroups:
    def test_the_first_pattern_decides(self):
        groups = {"5.*": "head", "norm": "norm", "bias": "bias"}
        kernel = NTKKernel(normalised().double().eval(), variance_groups=groups)
        assert kernel.network.group_names == ("other", "bias", "norm", "head")
        jacobian = explicit_jacobian(normalised_like(kernel), inputs())
        labels = kernel.network.specification.group_labels
        expected = dict(zip(kernel.network.parameter_names, labels, strict=True))
        assert {name for name, group in expected.items() if group == "head"} == {"5.weight", "5.bias"}
        assert expected["1.bias"] == expected["4.weight"] == "norm"
        assert expected["0.bias"] == expected["3.layer.bias"] == "bias"
        kernel.variance = torch.tensor([1.0, 2.0, 3.0, 4.0])
        values = dict(zip(kernel.network.group_names, [1.0, 2.0, 3.0, 4.0], strict=True))
        sizes = [kernel.network.get_buffer(f"tensors.{name}").numel() for name in kernel.network.parameter_names]
        variances = torch.cat(
            [torch.full((n,), values[g], dtype=torch.float64) for n, g in zip(sizes, labels, strict=True)]
        )
        torch.testing.assert_close(
            kernel(inputs()).to_dense(), jacobian * variances @ jacobian.mT, rtol=1e-6, atol=1e-8
        )

    def test_a_pattern_that_decides_nothing(self):
        with pytest.raises(ValueError, match=r"patterns \['convs\*'\] of variance_groups decide for no"):
            NTKKernel(normalised(), variance_groups={"convs*": "conv", "bias": "bias"})
        with pytest.raises(ValueError, match=r"\['5.bias'\] .*\(patterns before them take all that they match\)"):
            NTKKernel(normalised(), variance_groups={"bias": "bias", "5.bias": "last bias"})

    @pytest.mark.parametrize("groups", [{}, {"conv*": 1}, {"conv*": ["conv"]}])
    def test_strings_to_strings(self, groups):
        with pytest.raises(TypeError, match="must map patterns to the names of groups"):
            NTKKernel(normalised(), variance_groups=groups)


def normalised_like(kernel: NTKKernel) -> nn.Module:
    """The network that a kernel has a snapshot of."""
    network = normalised().double().eval()
    network.load_state_dict({key.removeprefix("tensors."): v for key, v in kernel.network.state_dict().items()})
    return network
