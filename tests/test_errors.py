"""Bad input is met at the door, by an error that names what came, what was expected and the way out."""

import gpytorch
import pytest
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel, adapted_network, draw_functions, settings


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

    @pytest.mark.parametrize("output", [1.5, True])
    def test_output_is_no_index(self, module, output):
        with pytest.raises(TypeError, match=r"output must be an index, 'all', None, .*; got"):
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
        with pytest.raises(ValueError, match=r"must be 'layer', 'parameter', a function .* got 'layers'"):
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

    def test_the_name_of_nothing(self, evaluate):
        with pytest.raises(ValueError, match=r"no 'first': it is a tensor of shape \(\d, 2\)"):
            evaluate(make_network(outputs=2), torch.randn(5, 3), output="first")

    def test_not_a_tensor(self, evaluate):
        with pytest.raises(TypeError, match=r"returned a tuple of 2: Tensor, tuple, but a tensor was expected"):
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


class TestWaysOut:
    """What people reach for first, and where they are led."""

    @pytest.mark.parametrize(
        "options", [{"ard_num_dims": 3}, {"lengthscale_prior": gpytorch.priors.GammaPrior(1.0, 1)}]
    )
    def test_options_for_lengthscales(self, options):
        with pytest.raises(TypeError, match=rf"no lengthscales, so {next(iter(options))} .*scales its own inputs"):
            NTKKernel(make_network(), **options)

    def test_an_option_that_does_not_exist(self):
        with pytest.raises(TypeError, match=r"no option paramters; its options are parameters"):
            NTKKernel(make_network(), paramters="*")

    def test_base_class_defaults_are_no_options(self):
        NTKKernel(make_network(), ard_num_dims=None, lengthscale_prior=None)

    def test_all_parameters_are_frozen(self):
        with pytest.raises(ValueError, match=r'are frozen: pass parameters="\*"'):
            NTKKernel(make_network().requires_grad_(False))
        NTKKernel(make_network().requires_grad_(False), parameters="*")
        with pytest.raises(ValueError, match=r"It has: 0.weight") as caught:
            NTKKernel(make_network().requires_grad_(False), parameters="head.*")
        assert "frozen" not in str(caught.value)

    @pytest.mark.parametrize("x", [torch.zeros(4, 3).numpy(), [[0.0, 0.0, 0.0]]], ids=["numpy", "list"])
    @pytest.mark.parametrize(
        "evaluate",
        [
            lambda network, x: NTKKernel(network)(x),
            lambda network, x: NTKKernel(network)(torch.zeros(4, 3), x),
            lambda network, x: NTKKernel(network).jacobian(x),
            lambda network, x: NTKKernel(network).engine_report(x),
            lambda network, x: NetworkMean(network)(x),
            lambda network, x: adapted_network(predicting(network))(x),
            lambda network, x: draw_functions(predicting(network), 2)(x),
        ],
    )
    def test_inputs_that_are_no_tensor(self, evaluate, x):
        with pytest.raises(TypeError, match=r"torch.Tensor, got (ndarray|list)\. .*torch.from_numpy"):
            evaluate(make_network(), x)

    @pytest.mark.parametrize("function", [adapted_network, lambda network: draw_functions(network, 2)])
    @pytest.mark.parametrize("wrong", [make_network(), NTKKernel(make_network())])
    def test_a_network_in_place_of_a_model(self, function, wrong):
        with pytest.raises(TypeError, match=rf"ExactGP .*got {type(wrong).__name__}\. .*NetworkMean\(network\)"):
            function(wrong)

    def test_tracing(self):
        kernel, mean = NTKKernel(make_network()), NetworkMean(make_network())
        for function in (lambda x: kernel(x).to_dense(), mean):
            with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot .*torch.export.export\(ntk_gp.adapted"):
                torch.jit.trace(function, torch.randn(4, 3), check_trace=False)

    def test_pathwise_sampling_of_botorch(self):
        pathwise = pytest.importorskip("botorch.sampling.pathwise")
        models = pytest.importorskip("botorch.models")
        x = torch.randn(5, 3, dtype=torch.float64)
        for compose in (lambda kernel: kernel, gpytorch.kernels.ScaleKernel):
            kernel = compose(NTKKernel(make_network().double())).double()
            model = models.SingleTaskGP(x, x[:, :1], covar_module=kernel, outcome_transform=None)
            with pytest.raises(NotImplementedError, match=r"ntk_gp.draw_functions\(model, k\)"):
                pathwise.draw_matheron_paths(model, torch.Size([2]))


def predicting(network: nn.Module) -> gpytorch.models.ExactGP:
    x = torch.randn(6, 3)
    model = AdaptedGP(x, x.sum(-1), NTKKernel(network))
    model.mean_module = NetworkMean(network)
    return model.eval()


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1GB", 10**9),
            ("1 gb", 10**9),
            ("512 MiB", 512 * 2**20),
            ("2e9", 2 * 10**9),
            ("1.5 KiB", 1536),
            ("4096", 4096),
            (" 3 TB ", 3 * 10**12),
            ("7B", 7),
            (12345, 12345),
            (1e6, 10**6),
        ],
    )
    def test_budgets(self, text, number):
        with settings.memory_budget(text):
            assert settings.memory_budget.value() == settings.memory_budget.bytes(torch.device("cpu")) == number
        assert settings.memory_budget.value() is None
        settings.memory_budget._set_value(text)
        try:
            assert settings.memory_budget.value() == number
        finally:
            settings.memory_budget._set_value(None)

    @pytest.mark.parametrize("bad", ["much", "1 XB", "", "GB", "1..5GB", "1GB2", "nan"])
    def test_budgets_that_are_none(self, bad):
        with pytest.raises(ValueError, match=r"is no number of bytes: write for instance '1GB', '512 MiB' or 2e9"):
            settings.memory_budget(bad)

    @pytest.mark.parametrize("setting", [settings.memory_budget, settings.solve_tolerance, settings.love_tolerance])
    @pytest.mark.parametrize("bad", [-1, -1e-9, 0, float("nan"), float("inf")])
    def test_not_positive(self, setting, bad):
        with pytest.raises(ValueError, match=rf"{setting.__name__} must be positive and finite, got"):
            setting(bad)

    @pytest.mark.parametrize("setting", [settings.solve_tolerance, settings.love_tolerance])
    @pytest.mark.parametrize("bad", ["1e-4", True, None])
    def test_no_number(self, setting, bad):
        with pytest.raises(TypeError, match=rf"{setting.__name__} must be a number, got"):
            setting(bad)

    def test_a_negative_budget_as_text(self):
        with pytest.raises(ValueError, match="must be positive"):
            settings.memory_budget("-1GB")


class TestImages:
    """Inputs as the network wants them, where GPyTorch leaves no doubt."""

    shape = (2, 4, 4)

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()

    @pytest.mark.parametrize("batch", [(), (3,)])
    def test_kernel_mean_and_jacobian(self, batch):
        network = self.make()
        x, z = (torch.randn(*batch, n, *self.shape, dtype=torch.float64) for n in (5, 4))
        kernel, mean = (module(network, input_shape=self.shape) for module in (NTKKernel, NetworkMean))
        flat, flat_z = x.flatten(-3), z.flatten(-3)
        assert kernel(x).shape == (*batch, 5, 5)
        torch.testing.assert_close(kernel(x).to_dense(), kernel(flat).to_dense())
        torch.testing.assert_close(kernel(x, z).to_dense(), kernel(flat, flat_z).to_dense())
        torch.testing.assert_close(kernel(x, flat_z).to_dense(), kernel(flat, flat_z).to_dense())
        torch.testing.assert_close(kernel(x, diag=True), kernel(flat, diag=True))
        torch.testing.assert_close(mean(x), mean(flat))
        torch.testing.assert_close(kernel.jacobian(x).to_dense(), kernel.jacobian(flat).to_dense())
        assert kernel.engine_report(x) == kernel.engine_report(flat)

    def test_what_is_handed_out(self):
        network, x = self.make(), torch.randn(6, 32, dtype=torch.float64)
        model = AdaptedGP(x, x.sum(-1), NTKKernel(network, input_shape=self.shape)).double()
        model.mean_module = NetworkMean(network, input_shape=self.shape)
        adapted, functions = adapted_network(model.eval()), draw_functions(model, 2)
        torch.testing.assert_close(adapted(x.unflatten(-1, self.shape)), adapted(x))
        torch.testing.assert_close(functions(x.unflatten(-1, self.shape)), functions(x))

    def test_rows_of_the_right_width_are_rows(self):
        """An input_shape of one dimension beside ones: (n, 1, 1, 3) may be batches of one point, as in GPyTorch."""
        network = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
        assert NTKKernel(network, input_shape=(1, 1, 3))(torch.randn(5, 1, 1, 3)).shape == (5, 1, 1, 1)

    def test_in_a_model_they_are_batches(self):
        network, x = self.make(), torch.randn(6, *self.shape, dtype=torch.float64)
        for compose in (lambda kernel: kernel, gpytorch.kernels.ScaleKernel):
            kernel = compose(NTKKernel(network, input_shape=self.shape))
            model = AdaptedGP(x, torch.randn(6).double(), kernel).double().eval()
            model.mean_module = NetworkMean(network, input_shape=self.shape)
            with pytest.raises(ValueError, match=r"x.flatten\(1\) for the whole model"):
                model(x)
        kernel = gpytorch.kernels.ScaleKernel(NTKKernel(network, input_shape=self.shape)).double()
        with pytest.raises(ValueError, match=r"x.flatten\(1\) for the whole model"):
            kernel(x).to_dense()


def test_progress_bars(monkeypatch):
    """Every long stage says what it is; without bars nothing is asked of tqdm."""
    tqdm = pytest.importorskip("tqdm.auto")
    labels = []
    original = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda *a, desc="", **k: labels.append(desc) or original(*a, desc=desc, **k))
    x = torch.randn(1100, 3, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 1)).double()
    model = AdaptedGP(x, x.sum(-1), NTKKernel(network, engine="structured")).double()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)

    def everything() -> None:
        mll(model.train()(x), x.sum(-1))
        model.eval()(x[:3] + 1).variance  # noqa: B018
        with settings.memory_budget("20 MB"):
            NetworkMean(network)(torch.randn(5000, 3, dtype=torch.float64))

    everything()
    assert not labels
    with settings.progress_bar(True):
        model = AdaptedGP(x + 1, x.sum(-1), NTKKernel(network, engine="structured")).double()
        x = x + 1
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        everything()
    assert {"Gram matrix", "Factorisation", "Eigenvalues", "Network"} <= set(labels), labels
