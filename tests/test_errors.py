"""Bad input is met at the door, by an error that names what came, what was expected and the way out."""

import gpytorch
import pytest
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel


def make_network(inputs: int = 3, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def train(x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel | None = None) -> Tensor:
    model = AdaptedGP(x, y, kernel or gpytorch.kernels.ScaleKernel(NTKKernel(make_network())))
    return gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y)


def predict(x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel | None = None) -> Tensor:
    model = AdaptedGP(x, y, kernel or gpytorch.kernels.ScaleKernel(NTKKernel(make_network()))).eval()
    return model(torch.randn(2, x.shape[-1], dtype=x.dtype)).mean


both_modules = pytest.mark.parametrize(
    "evaluate",
    [
        lambda network, x, **options: NTKKernel(network, **options)(x).to_dense(),
        lambda network, x, **options: NetworkMean(network, **options)(x),
    ],
    ids=["kernel", "mean"],
)


@both_modules
def test_wrong_feature_width(evaluate):
    with pytest.raises(ValueError, match=r"inputs of shape \(n, 2\).*features it was trained with"):
        evaluate(make_network(), torch.randn(5, 2))


@both_modules
def test_wrong_feature_width_for_the_input_shape(evaluate):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"width 15 .*input_shape=\(1, 4, 4\) needs 16 features.*change input_shape"):
        evaluate(network, torch.randn(5, 15), input_shape=(1, 4, 4))


@both_modules
def test_an_image_network_without_input_shape(evaluate):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"inputs of shape \(n, 16\).*input_shape="):
        evaluate(network, torch.randn(5, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@both_modules
def test_nan_or_inf_in_the_inputs(evaluate, bad):
    x = torch.randn(5, 3)
    x[3, 1] = bad
    with pytest.raises(
        ValueError, match=r"shape \(5, 3\) have NaN or infinite features, first in rows \[\[3\]\].*Remove"
    ):
        evaluate(make_network(), x)


@pytest.mark.parametrize("run", [train, predict])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [5, 900])
def test_nan_or_inf_in_the_targets(run, bad, n):
    y = torch.randn(n)
    y[3] = bad
    with pytest.raises(ValueError, match=r"(?s)NaN or infinite.*Remove them.*observation_nan_policy"):
        run(torch.randn(n, 3), y)


def test_the_two_inputs_differ_in_dtype():
    kernel = NTKKernel(make_network())
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, and torch.float64 on cpu. Convert one with .to\(\)"):
        kernel(torch.randn(5, 3), torch.randn(4, 3).double()).to_dense()


def test_the_two_inputs_differ_in_device():
    kernel = NTKKernel(make_network())
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, and torch.float32 on meta. Convert one with .to\(\)"):
        kernel(torch.randn(5, 3), torch.randn(4, 3, device="meta")).to_dense()


def test_the_targets_differ_in_dtype_from_the_inputs():
    with pytest.raises(ValueError, match=r"(?s)targets are torch.float64 on cpu, the inputs torch.float32.*\.to\(\)"):
        predict(torch.randn(5, 3), torch.randn(5).double())


@both_modules
def test_integer_inputs(evaluate):
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int64. Cast them"):
        evaluate(make_network(), torch.ones(5, 3, dtype=torch.long))


@pytest.mark.parametrize("run", [train, predict])
def test_empty_training_set(run):
    with pytest.raises(ValueError, match=r"(?s)(training set is empty|no training data).*at least one"):
        run(torch.randn(0, 3), torch.randn(0))


@pytest.mark.parametrize("module", [NTKKernel, NetworkMean])
class TestNetworks:
    def test_not_a_module(self, module):
        with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
            module(lambda x: x)

    def test_a_class_in_place_of_a_module(self, module):
        with pytest.raises(TypeError, match=r"torch.nn.Module, got type"):
            module(nn.Linear)

    def test_without_parameters(self, module):
        with pytest.raises(ValueError, match=r"Tanh has no parameters.*Pass the trained"):
            module(nn.Tanh())

    def test_uninitialised(self, module):
        with pytest.raises(ValueError, match=r"0.weight of the network is uninitialised. Run the network once"):
            module(nn.Sequential(nn.LazyLinear(3)))

    def test_complex(self, module):
        with pytest.raises(TypeError, match="weight of the network is complex"):
            module(nn.Linear(2, 1, dtype=torch.complex64))

    def test_scripted(self, module):
        with pytest.raises(TypeError, match=r"TorchScript module cannot be linearised. Pass the original"):
            module(torch.jit.script(nn.Linear(2, 1)))

    @pytest.mark.parametrize("output", [1.5, "first", True])
    def test_output_is_no_index(self, module, output):
        with pytest.raises(TypeError, match="output must be an index, 'all' or None, got"):
            module(make_network(outputs=2), output=output)


class TestSelections:
    def test_nothing_requires_gradients(self):
        with pytest.raises(ValueError, match=r"selected by requires_grad=True. It has: 0.weight, 0.bias, 2.weight"):
            NTKKernel(make_network().requires_grad_(False))

    def test_pattern_matches_nothing(self):
        with pytest.raises(ValueError, match=r"selected by parameters=\['head.\*'\]. It has: 0.weight"):
            NTKKernel(make_network(), parameters="head.*")

    def test_one_pattern_of_several_matches_nothing(self):
        with pytest.raises(ValueError, match=r"patterns \['head.\*'\] match no parameter. The network has: 0.weight"):
            NTKKernel(make_network(), parameters=["2.*", "head.*"])

    def test_predicate_matches_nothing(self):
        with pytest.raises(ValueError, match="selected by the predicate nothing"):

            def nothing(name: str, parameter: nn.Parameter) -> bool:
                return False

            NTKKernel(make_network(), parameters=nothing)

    def test_unused_parameters(self):
        with pytest.raises(
            ValueError, match=r"does not depend differentiably on any of the selected .*\(unused.weight"
        ):
            NTKKernel(Unused(), parameters="unused.*")(torch.randn(4, 2)).to_dense()

    def test_variance_groups(self):
        with pytest.raises(ValueError, match="must be 'layer', 'parameter' or a function of a name, got 'layers'"):
            NTKKernel(make_network(), variance_groups="layers")

    def test_variance_options_without_groups(self):
        with pytest.raises(ValueError, match="need variance_groups"):
            NTKKernel(make_network(), variance_prior=gpytorch.priors.GammaPrior(1.0, 1.0))
        with pytest.raises(RuntimeError, match="no variances of its own: pass variance_groups, or use a ScaleKernel"):
            NTKKernel(make_network()).variance = 2.0


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@both_modules
class TestOutputs:
    def test_several_without_a_choice(self, evaluate):
        with pytest.raises(ValueError, match=r"2 outputs for each input .*one was expected. Choose it with output=k"):
            evaluate(make_network(outputs=2), torch.randn(5, 3))

    @pytest.mark.parametrize("output", [2, -3])
    def test_out_of_range(self, evaluate, output):
        with pytest.raises(ValueError, match=rf"output={output} is out of range: the network has 2 outputs, 0 to 1"):
            evaluate(make_network(outputs=2), torch.randn(5, 3), output=output)

    def test_not_a_tensor(self, evaluate):
        with pytest.raises(TypeError, match=r"returned a tuple, but a tensor was expected. Wrap it"):
            evaluate(nn.LSTM(3, 1, batch_first=True), torch.randn(5, 3))

    def test_not_one_row_for_each_input(self, evaluate):
        class Transposed(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).mT

        with pytest.raises(ValueError, match=r"returned shape \(1, 5\) for 5 inputs; expected \(5,\) or \(5, C\)"):
            evaluate(Transposed(3, 1), torch.randn(5, 3))

    @pytest.mark.parametrize(
        "forward",
        [
            lambda z: z.detach(),
            lambda z: z.argmax(-1),
            lambda z: (z > 0).to(z.dtype),
            lambda z: torch.no_grad()(lambda: z * 1)(),
        ],
    )
    def test_not_differentiable(self, evaluate, forward):
        network = Function(forward)
        with pytest.raises(ValueError, match=r"does not depend differentiably on any.*without detach\(\)"):
            evaluate(network, torch.randn(5, 3))

    def test_of_another_dtype(self, evaluate):
        with pytest.raises(TypeError, match=r"returned torch.float16 for inputs of torch.float32.*remove that cast"):
            evaluate(Function(lambda z: z.half()), torch.randn(5, 3))

    def test_not_finite(self, evaluate):
        with pytest.raises(ValueError, match="output is NaN or infinite at finite inputs"):
            evaluate(Function(lambda z: z / 0.0), torch.randn(5, 3))


class Function(nn.Linear):
    """A function of a linear layer's output."""

    def __init__(self, function):
        super().__init__(3, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


@both_modules
class TestRows:
    """A row's output must not change with the other rows."""

    @pytest.mark.parametrize(
        "mix",
        [
            lambda z: z - z.mean(0),
            lambda z: z / z.std(0),
            lambda z: z.cumsum(0),
            lambda z: z + 1e-3 * z.max(),
            lambda z: z.flip(0),
            lambda z: nn.functional.batch_norm(z, None, None, training=True),
        ],
    )
    def test_mixed(self, evaluate, mix):
        with pytest.raises(ValueError, match=r"changes with the other rows of the batch.*track_running_stats=True"):
            evaluate(Function(mix), torch.randn(5, 3))

    def test_mixed_seen_late(self, evaluate):
        """One row alone cannot show it; the next inputs do."""
        network = Function(lambda z: z - z.mean(0) + z.detach().sum() * 0)
        module = NTKKernel(network)
        module(torch.randn(1, 3)).to_dense()
        with pytest.raises(ValueError, match="changes with the other rows"):
            module(torch.randn(2, 3)).to_dense()

    def test_batch_norm_without_running_statistics(self, evaluate):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
        with pytest.raises(ValueError, match=r"changes with the other rows|one row"):
            evaluate(network, torch.randn(5, 3))

    @pytest.mark.parametrize("noise", [lambda z: z + torch.randn_like(z), nn.functional.dropout])
    def test_random(self, evaluate, noise):
        with pytest.raises(ValueError, match=r"different outputs for the same inputs.*training=self.training"):
            evaluate(Function(noise), torch.randn(5, 3))

    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    def test_independent_rows_of_any_scale_pass(self, evaluate, scale):
        evaluate(Function(lambda z: z * scale), torch.randn(5, 3))


def test_incompatible_batches():
    kernel = NTKKernel(make_network(), batch_shape=torch.Size([2]))
    with pytest.raises(RuntimeError, match=r"not broadcast"):
        kernel(torch.randn(3, 5, 3)).to_dense()


def test_a_network_that_cannot_be_copied():
    network = make_network()
    network.stream = (i for i in range(3))
    with pytest.raises(TypeError, match=r"Sequential\) cannot be copied: .*support copy.deepcopy"):
        NTKKernel(network)
