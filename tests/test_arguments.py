"""Networks as users have them: whole numbers and several arguments go in, dictionaries and tuples come out."""

import pickle
from typing import NamedTuple

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

from ntk_gp import AdaptedGP, FeatureKernel, GainKernel, NetworkMean, NTKKernel, adapted_network, draw_functions, pack
from ntk_gp.testing import explicit_jacobian

SHAPES = {"ids": (5,), "mask": (5,)}
DTYPES = {"ids": torch.long, "mask": torch.bool}


class Returned(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Classifier(nn.Module):
    """An encoder as those of language models: attention with a mask over token ids, several results."""

    def __init__(self, kind: str = "dict"):
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids, mask):
        if ids.dtype != torch.long or mask.dtype != torch.bool:
            raise TypeError("token ids and a mask are wanted")
        embedded = self.embedding(ids)
        attended, _ = self.attention(embedded, embedded, embedded, key_padding_mask=~mask)
        weights = mask.to(attended.dtype).unsqueeze(-1)
        pooled = (attended * weights).sum(1) / weights.sum(1)
        logits = self.head(pooled.tanh())
        if self.kind == "dict":
            return {"logits": logits, "hidden": attended}
        return Returned(logits, attended) if self.kind == "named" else (logits, attended)


class Bag(nn.Module):
    """One argument of token ids."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1).tanh())


def made(factory, *args) -> nn.Module:
    torch.manual_seed(0)
    return factory(*args).double()


def texts(n: int) -> dict[str, Tensor]:
    ids = torch.randint(9, (n, 5))
    return {"ids": ids, "mask": torch.arange(5) < torch.randint(2, 6, (n, 1))}


def sum_of_classes(returned) -> Tensor:
    return returned["logits"].sum(-1)


engines = pytest.mark.parametrize("engine", ["structured", "autodiff"])


@engines
@pytest.mark.parametrize(
    "kind, output",
    [
        ("dict", ("logits", "all")),
        ("dict", ("logits", 1)),
        ("dict", sum_of_classes),
        ("dict", ("hidden", 0, -1)),  # a position in the sequence, and a column there
        ("named", ("logits", 2)),
        ("tuple", (0, "all")),
    ],
)
def test_kernel_and_mean(engine, kind, output):
    network = made(Classifier, kind)
    options = {"input_shape": SHAPES, "input_dtype": DTYPES, "output": output}
    x, other = (pack(SHAPES, texts(n), torch.float64) for n in (6, 4))
    kernel = NTKKernel(network, engine=engine, **options)
    J, J_other = (explicit_jacobian(network, given, **options) for given in (x, other))
    torch.testing.assert_close(kernel(x, other).to_dense(), J @ J_other.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(kernel(x, diag=True), (J @ J.mT).diagonal(), rtol=0, atol=1e-10)
    mean = NetworkMean(network, **options)(x)
    with torch.no_grad():
        returned = network.eval()(x[:, :5].long(), x[:, 5:].bool())
    logits, hidden = returned.values() if kind == "dict" else returned
    expected = {
        ("logits", "all"): logits,
        (0, "all"): logits,
        ("logits", 1): logits[:, 1],
        ("logits", 2): logits[:, 2],
        ("hidden", 0, -1): hidden[:, 0, -1],
        sum_of_classes: logits.sum(-1),
    }[output]
    torch.testing.assert_close(mean, expected)
    features = GainKernel(network, **options).features(x)
    torch.testing.assert_close(features[..., : features.shape[-1] // 2].sum(-1), expected.reshape(-1))


class TokenGP(gpytorch.models.ExactGP):
    def __init__(self, x, y, network):
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = NetworkMean(network, input_dtype=torch.long)
        self.covar_module = ScaleKernel(NTKKernel(network, input_dtype=torch.long))

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_integer_inputs_go_through_an_exact_gp():
    """Whether token ids come as integers or as floating-point numbers, the model is the same, and is right."""
    network = made(Bag)
    x, other = torch.randint(9, (7, 6)), torch.randint(9, (4, 6))
    y = torch.randn(7, dtype=torch.float64)
    noise = 0.1
    J, J_other = (explicit_jacobian(network, given.double(), input_dtype=torch.long) for given in (x, other))
    K = J @ J.mT + noise * torch.eye(7, dtype=y.dtype)
    with torch.no_grad():
        residual = y - network(x).squeeze(-1)
        mean = network(other).squeeze(-1) + J_other @ J.mT @ torch.linalg.solve(K, residual)
    covariance = J_other @ J_other.mT - J_other @ J.mT @ torch.linalg.solve(K, J @ J_other.mT)
    for given, at in ((x, other), (x.double(), other.double())):
        model = TokenGP(given, y, network).double()
        model.likelihood.noise, model.covar_module.outputscale = torch.tensor(noise, dtype=y.dtype), 1.0
        model.train()
        loss = -gpytorch.ExactMarginalLogLikelihood(model.likelihood, model)(model(given), y)
        loss.backward()
        model.eval()
        prediction = model(at)
        torch.testing.assert_close(prediction.mean, mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(prediction.covariance_matrix, covariance, rtol=0, atol=1e-9)
        served = adapted_network(model)
        torch.testing.assert_close(served(at), mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(pickle.loads(pickle.dumps(served))(other), mean, rtol=0, atol=1e-9)
        assert draw_functions(model, 3)(at).shape == (3, 4)
        exported = torch.export.export(served, (at,)).module()
        torch.testing.assert_close(exported(at), served(at))


def test_integer_inputs_of_an_adapted_gp():
    network = made(Bag)
    x, y = torch.randint(9, (12, 6)), torch.randn(12, dtype=torch.float64)
    terms = ("gain", "tangent", "features", "metric")
    gp = AdaptedGP(x, y, network.double(), input_dtype=torch.long, terms=terms).double()
    prediction = gp.predict(torch.randint(9, (3, 6)), draws=4)
    assert prediction.mean.shape == (3,) and prediction.mean.isfinite().all()


def test_multitask_model_of_a_classifier():
    network = made(Classifier)
    options = {"input_shape": SHAPES, "input_dtype": DTYPES, "output": ("logits", "all")}

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x, y):
            super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks=3, rank=0, has_task_noise=False))
            self.mean_module = NetworkMean(network, **options)
            self.covar_module = NTKKernel(network, **options)

        def forward(self, x):
            return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))

    x, at = (pack(SHAPES, texts(n), torch.float64) for n in (6, 4))
    y = torch.randn(6, 3, dtype=torch.float64)
    model = Model(x, y).double().eval()
    model.likelihood.noise = torch.tensor(0.2, dtype=y.dtype)
    with torch.no_grad():
        mean = model(at).mean
        J, J_at = (explicit_jacobian(network, given, **options) for given in (x, at))
        prior, prior_at = (network(g[:, :5].long(), g[:, 5:].bool())["logits"] for g in (x, at))
        shift = J_at @ J.mT @ torch.linalg.solve(J @ J.mT + 0.2 * torch.eye(18, dtype=y.dtype), (y - prior).reshape(-1))
    torch.testing.assert_close(mean, prior_at + shift.reshape(4, 3), rtol=0, atol=1e-9)
    torch.testing.assert_close(adapted_network(model)(at), mean, rtol=0, atol=1e-9)


def test_features_of_a_network_with_several_results():
    network = made(Classifier)
    kernel = FeatureKernel(
        network, gpytorch.kernels.RBFKernel(), input_shape=SHAPES, input_dtype=DTYPES, output=("logits", "all")
    )
    x = pack(SHAPES, texts(5), torch.float64)
    hidden = network.eval()(x[:, :5].long(), x[:, 5:].bool())["hidden"]
    mask = x[:, 5:].unsqueeze(-1)
    torch.testing.assert_close(kernel.features(x), ((hidden * mask).sum(1) / mask.sum(1)).tanh())


class TestExactness:
    """Whole numbers are carried exactly, or refused."""

    def test_of_packed_integers(self):
        ids = torch.tensor([[1 << 24, 3]])
        assert pack({"ids": (2,)}, {"ids": ids}).dtype == torch.get_default_dtype()
        with pytest.raises(ValueError, match=r"exactly up to 16777216, got 16777217.*float64"):
            pack({"ids": (2,)}, {"ids": ids + 1})
        assert pack({"ids": (2,)}, {"ids": ids + 1}, torch.float64)[0, 0] == (1 << 24) + 1
        with pytest.raises(ValueError, match=r"float16.* up to 2048"):
            pack({"ids": (2,)}, {"ids": ids}, torch.float16)

    def test_of_rows_that_may_have_been_rounded(self):
        kernel = NTKKernel(made(Bag).float(), input_dtype=torch.long)
        with pytest.raises(ValueError, match="float32 holds whole numbers exactly up to 16777216"):
            kernel.network.inputs.check(torch.full((1, 3), 2.0**25))

    def test_a_fraction_is_no_token(self):
        network = made(Bag)
        x = torch.tensor([[1.0, 2.0], [0.0, 2.5]], dtype=torch.float64)
        for part in (NTKKernel(network, input_dtype=torch.long), NetworkMean(network, input_dtype=torch.long)):
            with pytest.raises(ValueError, match=r"whole numbers, got 2\.5"):
                part(x).to_dense() if isinstance(part, NTKKernel) else part(x)

    def test_of_small_dtypes(self):
        kernel = NTKKernel(made(Bag), input_dtype=torch.uint8)
        with pytest.raises(ValueError, match="holds 0 to 255, got -1 to 3"):
            kernel.network.inputs.check(torch.tensor([[-1.0, 3.0]]))


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"output": "logit"}, ValueError, r"no 'logit'.*dict with 'logits', 'hidden'"),
        ({"output": "logits"}, ValueError, "3 outputs for each input"),
        ({}, TypeError, "a dict with 'logits', 'hidden'.*output="),
        ({"output": ("logits", 3)}, ValueError, r"output=3 is out of range: the network has 3"),
        ({"output": 1.5}, TypeError, "output must be an index"),
        ({"output": (None, "all")}, TypeError, "name, a position or a function"),
        ({"output": "logits", "input_dtype": torch.float32}, ValueError, "integer or boolean"),
        ({"output": "logits", "input_dtype": {"id": torch.long}}, ValueError, "a shape is needed for each name"),
        ({"output": "logits", "input_shape": None, "input_dtype": DTYPES}, TypeError, "needs input_shape by name"),
        ({"output": "logits", "input_shape": {"ids": (5,), "mask": (4,)}}, ValueError, r"width 10 .*needs 9.*pack"),
    ],
)
def test_what_is_refused(options, error, match):
    network = made(Classifier)
    x = pack(SHAPES, texts(4), torch.float64)
    with pytest.raises(error, match=match):
        NTKKernel(network, **{"input_shape": SHAPES, "input_dtype": DTYPES} | options)(x).to_dense()


def test_packing_checks_names_and_shapes():
    given = texts(4)
    with pytest.raises(ValueError, match="tensors ids, mask, got ids"):
        pack(SHAPES, {"ids": given["ids"]})
    with pytest.raises(ValueError, match=r"'mask' of shape \(n, 5\), got \(4, 4\)"):
        pack(SHAPES, {"ids": given["ids"], "mask": given["mask"][:, 1:]})


def test_integers_where_none_are_wanted():
    with pytest.raises(TypeError, match=r"input_dtype=torch\.long"):
        NTKKernel(made(nn.Linear, 2, 1))(torch.ones(3, 2, dtype=torch.long))


def test_gradients_with_respect_to_token_ids_are_refused():
    network = made(Bag)
    x = torch.randint(9, (4, 5)).double().requires_grad_()
    for part in (NTKKernel(network, input_dtype=torch.long), NetworkMean(network, input_dtype=torch.long)):
        with pytest.raises(ValueError, match=r"whole numbers.*learn_inducing_locations"):
            part(x).to_dense() if isinstance(part, NTKKernel) else part(x)


def test_images_and_their_rows_are_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    images = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    rows = images.flatten(1)
    kernel, mean = (make(network, input_shape=(2, 4, 4)) for make in (NTKKernel, NetworkMean))
    torch.testing.assert_close(kernel(images).to_dense(), kernel(rows).to_dense(), rtol=0, atol=0)
    torch.testing.assert_close(mean(images), mean(rows), rtol=0, atol=0)


def test_no_inputs_at_all_are_not_tried_at_zeros():
    """A sequence that is masked altogether has no mean, and is never evaluated where none is given."""
    network = made(Classifier)
    x = pack(SHAPES, texts(6), torch.float64)
    mean = NetworkMean(network, input_shape=SHAPES, input_dtype=DTYPES, output=("logits", 1))
    first = mean(x)
    torch.testing.assert_close(mean(x), first, rtol=0, atol=0)  # nothing is left to be evaluated
    assert mean(x[:0]).shape == (0,)
