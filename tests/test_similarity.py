"""Similarity of tasks, networks and targets against explicit Jacobians and dense algebra."""

import math

import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from scipy import linalg
from torch import nn

from ntk_gp import settings, similarity
from ntk_gp.similarity import resampling, subspaces

from . import references

pytestmark = pytest.mark.engine_independent


def make_network(outputs=1, width=6, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, outputs)
    return nn.Sequential(*layers).double()


def inputs(n=12, seed=1, shift=0.0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def parts(network, jacobian):
    """The columns of each layer, the whole first, by name."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in network]
    columns = jacobian.split(sizes, dim=-1)
    return {"whole": jacobian} | {f"{i}": part for i, part in enumerate(columns) if part.numel()}


def jacobians(network, x):
    return parts(network, references.jacobian(network, x))


def fisher_cosine(one, other):
    return torch.cosine_similarity(one.square().sum(0), other.square().sum(0), dim=0)


def dense_angles(one, other, left=False):
    """By dense decompositions and SciPy."""
    a, b = (torch.linalg.svd(part.mT if left else part).Vh[:4].mT for part in (one, other))
    return torch.from_numpy(linalg.subspace_angles(a.cpu().numpy(), b.cpu().numpy())).to(a.device).flip(-1)


def centred(kernel, outputs=1):
    n = len(kernel) // outputs
    centring = torch.kron(torch.eye(n) - 1 / n, torch.eye(outputs)).double()
    return centring @ kernel @ centring


def dense_alignment(one, other, outputs=1):
    one, other = centred(one, outputs), centred(other, outputs)
    return (one * other).sum() / (one.norm() * other.norm())


def drawn_sets(resamples, seed, *lengths):
    """The same sets of points as the bootstrap's, as indices."""
    drawing = resampling.Resampling(resamples, seed)
    counts = [drawing.weights(torch.zeros(n, 1)).long()[1:] for n in lengths]
    return [[torch.arange(n).repeat_interleave(row) for row in each] for n, each in zip(lengths, counts, strict=True)]


def rows_of(points, outputs):
    return (points.unsqueeze(-1) * outputs + torch.arange(outputs)).reshape(-1)


class TestTasks:
    @pytest.mark.parametrize("outputs", [1, 3])
    def test_against_explicit_jacobians(self, outputs):
        network, x_a, x_b = make_network(outputs), inputs(), inputs(9, seed=2, shift=0.3)
        found = similarity.of_tasks(network, x_a, x_b, rank=4, resamples=0)
        a, b = jacobians(network, x_a), jacobians(network, x_b)
        assert [row.name for row in found] == list(a)
        for row in found:
            one, other = a[row.name], b[row.name]
            assert row.parameters == one.shape[1]
            assert row.fisher.value == pytest.approx(fisher_cosine(one, other).item(), rel=1e-12)
            assert math.isnan(row.fisher.error)
            if outputs == 1 or row.name != "4":  # there, the fourth singular value is the fifth as well
                torch.testing.assert_close(row.angles, dense_angles(one, other), rtol=1e-8, atol=1e-8)
            assert row.overlap.value == pytest.approx(row.angles.cos().square().mean().item(), rel=1e-10)

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_weighted_by_residuals(self, outputs):
        network, x_a, x_b = make_network(outputs), inputs(), inputs(9, seed=2)
        y_a, y_b = torch.randn(12, outputs).double(), torch.randn(9, outputs).double()
        found = similarity.of_tasks(network, x_a, x_b, y_a, y_b, resamples=0)

        def gradients(x, y):
            rows = []
            for point, target in zip(x, y, strict=True):
                loss = (network(point.unsqueeze(0)) - target).square().sum() / 2
                rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(network.parameters()))]))
            return parts(network, torch.stack(rows))

        a, b = gradients(x_a, y_a), gradients(x_b, y_b)
        for row in found:
            assert row.fisher.value == pytest.approx(fisher_cosine(a[row.name], b[row.name]).item(), rel=1e-12)

    def test_targets_of_one_output_may_be_flat(self):
        network, x, y = make_network(), inputs(), torch.randn(12).double()
        flat, column = (similarity.of_tasks(network, x, x[:5], t, t[:5]).whole.fisher for t in (y, y.unsqueeze(-1)))
        assert flat == column

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_identical_tasks_in_any_order(self, outputs):
        x = inputs()
        found = similarity.of_tasks(make_network(outputs), x, x.flip(0), rank=4, resamples=0)
        for row in found:
            assert row.fisher.value == pytest.approx(1.0, abs=1e-12)
            assert row.overlap.value == pytest.approx(1.0, abs=1e-12)
            assert float(row.angles.max()) < 1e-6

    def test_order_of_points_and_tasks_is_no_matter(self):
        network, x_a, x_b = make_network(2), inputs(), inputs(9, seed=2, shift=0.3)
        one = similarity.of_tasks(network, x_a, x_b, rank=3, resamples=0)
        for other in (
            similarity.of_tasks(network, x_a.flip(0), x_b[torch.randperm(9)], rank=3, resamples=0),
            similarity.of_tasks(network, x_b, x_a, rank=3, resamples=0),
        ):
            for row, again in zip(one, other, strict=True):
                assert row.fisher.value == pytest.approx(again.fisher.value, abs=1e-12)
                torch.testing.assert_close(row.angles, again.angles, rtol=1e-8, atol=1e-7)

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_bootstrap_against_new_jacobians(self, outputs):
        network, x_a, x_b = make_network(outputs), inputs(), inputs(9, seed=2, shift=0.3)
        y_a, y_b = torch.randn(12, outputs).double(), torch.randn(9, outputs).double()
        found = similarity.of_tasks(network, x_a, x_b, rank=2, resamples=5, seed=3)
        weighted = similarity.of_tasks(network, x_a, x_b, y_a, y_b, rank=2, resamples=5, seed=3)
        ours, theirs = drawn_sets(5, 3, 12, 9)
        for k, row in enumerate(found):
            fisher, overlap = [], []
            for i, j in zip(ours, theirs, strict=True):
                a, b = jacobians(network, x_a[i])[row.name], jacobians(network, x_b[j])[row.name]
                fisher.append(fisher_cosine(a, b))
                a, b = (torch.linalg.svd(each).Vh[: len(row.angles)] for each in (a, b))
                overlap.append((a @ b.mT).square().sum() / len(a))
            assert row.fisher.error == pytest.approx(torch.stack(fisher).std().item(), rel=1e-10)
            assert row.overlap.error == pytest.approx(torch.stack(overlap).std().item(), rel=1e-7)
            assert weighted[k].fisher.error != row.fisher.error
            assert weighted[k].overlap == row.overlap

    def test_sets_in_parts_where_memory_is_short(self, monkeypatch):
        network, x_a, x_b = make_network(2), inputs(40), inputs(30, seed=2, shift=0.3)
        whole = similarity.of_tasks(network, x_a, x_b, resamples=7)
        rows = []
        original = similarity.fisher.diagonals
        monkeypatch.setattr(
            similarity.fisher, "diagonals", lambda t, weights, r: rows.append(len(weights)) or original(t, weights, r)
        )
        with settings.memory_budget(40_000):
            parts = similarity.of_tasks(network, x_a, x_b, resamples=7)
        assert max(rows) < 8
        for one, other in zip(whole, parts, strict=True):
            assert one.fisher == pytest.approx(other.fisher, rel=1e-10)
            assert one.overlap == pytest.approx(other.overlap, rel=1e-6)

    def test_last_layer_keeps_equal_singular_values_together(self):
        found = similarity.of_tasks(make_network(3), inputs(), inputs(9, seed=2), rank=4)
        assert len(found.layer("4").angles) == 6
        assert len(found.whole.angles) == 4

    def test_rank_ends_where_the_jacobians_does(self):
        found = similarity.of_tasks(make_network(), inputs(), inputs(9, seed=2), rank=5, by="parameter")
        bias = found.layer("4.bias")
        assert (len(bias.angles), bias.overlap.value, bias.chance) == (1, pytest.approx(1.0), 1.0)

    def test_layer_without_influence(self):
        network = make_network()
        with torch.no_grad():
            network[4].weight.zero_()
        found = similarity.of_tasks(network, inputs(), inputs(9, seed=2))
        row = found.layer("0")
        assert math.isnan(row.fisher.value) and math.isnan(row.overlap.value) and len(row.angles) == 0
        assert str(found).splitlines()[2].split() == ["0", "18", "–", "–", "–"]


class TestNetworks:
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_against_explicit_jacobians(self, outputs):
        one, other, x = make_network(outputs), make_network(outputs, width=7, seed=5), inputs()
        found = similarity.of_networks(one, other, x, rank=4, resamples=0)
        a, b = jacobians(one, x), jacobians(other, x)
        for row in found:
            left, right = a[row.name], b[row.name]
            assert row.parameters == (left.shape[1], right.shape[1])
            expected = dense_alignment(left @ left.mT, right @ right.mT, outputs)
            assert row.alignment.value == pytest.approx(expected.item(), rel=1e-10)
            if outputs == 1 or row.name != "4":
                torch.testing.assert_close(row.angles, dense_angles(left, right, left=True), rtol=1e-8, atol=1e-8)

    def test_same_network_and_its_multiple(self):
        network, x = make_network(2), inputs()
        twice = make_network(2)
        with torch.no_grad():
            twice[4].weight.mul_(2)
            twice[4].bias.mul_(2)
        for row in similarity.of_networks(network, network, x):
            assert row.alignment.value == pytest.approx(1.0, abs=1e-12)
            assert row.overlap.value == pytest.approx(1.0, abs=1e-12)
        for row in similarity.of_networks(network, twice, x).layers:
            assert row.alignment.value == pytest.approx(1.0, abs=1e-12)
            assert row.overlap.value == pytest.approx(1.0, abs=1e-8)

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_bootstrap_against_new_jacobians(self, outputs):
        one, other, x = make_network(outputs), make_network(outputs, seed=5), inputs()
        found = similarity.of_networks(one, other, x, rank=2, resamples=5, seed=3)
        a, b = jacobians(one, x), jacobians(other, x)
        for row in found:
            alignment, overlap = [], []
            for points in drawn_sets(5, 3, 12)[0]:
                i = rows_of(points, outputs)
                left, right = a[row.name][i], b[row.name][i]
                alignment.append(dense_alignment(left @ left.mT, right @ right.mT, outputs))
                u, v = (torch.linalg.svd(each).U[:, : len(row.angles)] for each in (left, right))
                overlap.append((u.mT @ v).square().sum() / u.shape[1])
            assert row.alignment.error == pytest.approx(torch.stack(alignment).std().item(), rel=1e-9)
            assert row.overlap.error == pytest.approx(torch.stack(overlap).std().item(), rel=1e-7)

    def test_constant_kernel_has_no_alignment(self):
        found = similarity.of_networks(make_network(), make_network(seed=5), inputs(), by="parameter")
        assert math.isnan(found.layer("4.bias").alignment.value)
        assert not math.isnan(found.layer("4.weight").alignment.value)

    def test_large_constant_takes_few_digits(self):
        """Kernels are centred before they are multiplied: what is left, a millionth of them here, counts once."""
        x = inputs()
        flat = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        with torch.no_grad():
            flat[0].weight.mul_(1e-3)
        left, right = jacobians(flat, x)["2"], jacobians(make_network(), x)["4"]
        left, right = left - left.mean(0), right - right.mean(0)
        left, right = left @ left.mT, right @ right.mT
        expected = (left * right).sum() / (left.norm() * right.norm())
        last = {"parameters": lambda name, p: name in ("2.weight", "2.bias", "4.weight", "4.bias") and p.shape[0] == 1}
        found = similarity.of_networks(flat, make_network(), x, by=None, **last)
        assert found.whole.alignment.value == pytest.approx(expected.item(), rel=1e-8)

    def test_of_other_forms(self):
        deeper = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        with pytest.raises(ValueError, match=r"'4' are in one only.*by=None"):
            similarity.of_networks(make_network(), deeper, inputs())
        (row,) = similarity.of_networks(make_network(), deeper, inputs(), by=None)
        assert 0 < row.alignment.value < 1

    def test_of_other_outputs(self):
        with pytest.raises(ValueError, match=r"as many outputs, got 1 and 2.*output=index"):
            similarity.of_networks(make_network(), make_network(2), inputs())
        found = similarity.of_networks(make_network(2), make_network(3), inputs(), output=1, by=None)
        assert len(found) == 1


class TestTargets:
    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("residuals", [False, True])
    def test_against_explicit_jacobians(self, outputs, residuals):
        network, x, y = make_network(outputs), inputs(), torch.randn(12, outputs).double()
        found = similarity.of_targets(network, x, y, residuals=residuals, resamples=4, seed=3)
        targets = (y - network(x).detach() if residuals else y).reshape(-1)
        for name, jacobian in jacobians(network, x).items():
            values = []
            for points in [torch.arange(12), *drawn_sets(4, 3, 12)[0]]:
                i = rows_of(points, outputs)
                gram = jacobian[i] @ jacobian[i].mT
                values.append(dense_alignment(gram, torch.outer(targets[i], targets[i]), outputs))
            row = found.layer(name)
            assert row.alignment.value == pytest.approx(values[0].item(), rel=1e-10)
            assert row.alignment.error == pytest.approx(torch.stack(values[1:]).std().item(), rel=1e-9)

    def test_block_by_block(self):
        network, x, y = make_network(2), inputs(40), torch.randn(40, 2).double()
        whole = similarity.of_targets(network, x, y, resamples=5)
        with settings.memory_budget(300_000):
            parts = similarity.of_targets(network, x, y, resamples=5)
        for one, other in zip(whole, parts, strict=True):
            assert one.alignment == pytest.approx(other.alignment, rel=1e-10)


class TestLeadingEigenpairs:
    def test_against_dense(self):
        torch.manual_seed(0)
        q = torch.linalg.qr(torch.randn(400, 400).double()).Q
        values = 0.8 ** torch.arange(400).double()
        matrix = (q * values) @ q.mT
        found, vectors = subspaces.leading_eigenpairs(lambda v: matrix @ v, matrix[0], 20, 5)
        torch.testing.assert_close(found[:5], values[:5], rtol=1e-12, atol=0.0)
        torch.testing.assert_close((vectors[:, :5].mT @ q[:, :5]).abs(), torch.eye(5).double(), rtol=0.0, atol=1e-7)

    def test_says_where_it_does_not_converge(self, monkeypatch):
        monkeypatch.setattr(subspaces, "_STEPS", 1)
        torch.manual_seed(0)
        matrix = torch.randn(300, 300).double()
        matrix = matrix @ matrix.mT
        with pytest.warns(NumericalWarning, match=r"leading 5 eigenvectors.*lower rank"):
            subspaces.leading_eigenpairs(lambda v: matrix @ v, matrix[0], 20, 5)

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_serves_many_rows(self, monkeypatch, outputs):
        network, x_a, x_b = make_network(outputs), inputs(60), inputs(50, seed=2, shift=0.3)
        dense = similarity.of_tasks(network, x_a, x_b, rank=3, resamples=3)
        monkeypatch.setattr(subspaces, "_DENSE", 10)
        searched = similarity.of_tasks(network, x_a, x_b, rank=3, resamples=3)
        with settings.memory_budget(100_000):  # no kernel matrix is formed
            without = similarity.of_tasks(network, x_a, x_b, rank=3, resamples=3)
        for row, *others in zip(dense, searched, without, strict=True):
            for other in others:
                torch.testing.assert_close(row.angles, other.angles, rtol=1e-6, atol=1e-6)
                assert row.overlap == pytest.approx(other.overlap, rel=1e-5)


@pytest.mark.engine_independent
class TestAngles:
    def test_small_and_large(self):
        """Angles that are known, in random coordinates: no digits are lost at either end."""
        torch.manual_seed(0)
        expected = torch.tensor([1e-12, 1e-8, 0.3, 1.2, torch.pi / 2 - 1e-9], dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(20, 10).double()).Q
        one, rest = q.split(5, dim=1)
        other = one * expected.cos() + rest * expected.sin()
        rotated = [each @ torch.linalg.qr(torch.randn(5, 5).double()).Q for each in (one, other)]
        torch.testing.assert_close(subspaces.principal_angles(*rotated), expected, rtol=1e-10, atol=1e-14)


class TestResults:
    def test_table(self):
        found = similarity.of_tasks(make_network(), inputs(), inputs(9, seed=2), rank=3)
        lines = str(found).splitlines()
        assert lines[0].split() == ["layer", "parameters", "Fisher", "cosine", "subspace", "overlap", "angles"]
        assert [line.split()[0] for line in lines[1:]] == ["whole", "0", "2", "4"]
        assert str(found.whole.fisher) in lines[1]
        assert found.whole is found[0] and found.layers == list(found)[1:]
        assert found._repr_html_().count("<tr>") == 5
        with pytest.raises(KeyError, match="'whole', '0', '2', '4'"):
            found.layer("1")

    def test_layers_by_name(self):
        found = similarity.of_targets(make_network(), inputs(), torch.randn(12), by=lambda name: name.split(".")[1])
        assert [row.name for row in found] == ["whole", "weight", "bias"]

    def test_parameters_of_the_network_itself(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2).double())

            def forward(self, x):
                return (x * self.scale).sin().sum(-1)

        assert [row.name for row in similarity.of_targets(Scaled(), inputs(), torch.randn(12))] == [
            "whole",
            "(network)",
        ]

    def test_inputs_of_any_shape_and_precision(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
        images = torch.randn(6, 1, 3, 3)
        found = similarity.of_tasks(network, images, images + 0.1, input_shape=(1, 3, 3), rank=2)
        flat = similarity.of_tasks(network, images.flatten(1), (images + 0.1).flatten(1), input_shape=(1, 3, 3), rank=2)
        exact = similarity.of_tasks(
            network.double(), images.double(), (images + 0.1).double(), input_shape=(1, 3, 3), rank=2
        )
        for row, other, third in zip(found, flat, exact, strict=True):
            assert row.fisher == other.fisher == third.fisher
            assert row.angles.dtype == torch.float64

    def test_network_and_mode_stay(self):
        network, x = make_network().train(), inputs().requires_grad_()
        before = [p.clone() for p in network.parameters()]
        with torch.inference_mode():
            similarity.of_tasks(network, x, x + 1, rank=2)
        found = similarity.of_tasks(network, x, x + 1, rank=2)
        assert network.training and not found.whole.angles.requires_grad and x.grad is None
        assert all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))


class TestErrors:
    def test_inputs(self):
        network, x = make_network(), inputs()
        broken = x.clone()
        broken[3, 0] = math.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            similarity.of_tasks(network, x, broken)
        with pytest.raises(ValueError, match=r"n > 0 as x_b, got \(0, 2\)"):
            similarity.of_tasks(network, x, x[:0])
        with pytest.raises(ValueError, match=r"as x, got \(3, 4, 2\)"):
            similarity.of_targets(network, x.reshape(3, 4, 2), torch.randn(12))
        with pytest.raises(TypeError, match=r"torch\.Tensor, got ndarray"):
            similarity.of_networks(network, network, x.numpy())

    def test_targets(self):
        network, x, y = make_network(), inputs(), torch.randn(12)
        with pytest.raises(ValueError, match="of both tasks or of neither"):
            similarity.of_tasks(network, x, x, y)
        with pytest.raises(ValueError, match=r"Expected y_b of shape \(12,\) or \(12, 1\), got \(11,\)"):
            similarity.of_tasks(network, x, x, y, y[:11])
        with pytest.raises(ValueError, match=r"y of shape \(12, 2\), got \(12,\)"):
            similarity.of_targets(make_network(2), x, y)
        with pytest.raises(ValueError, match=r"y is NaN or infinite, first in rows \[2\]"):
            similarity.of_targets(network, x, y.index_fill(0, torch.tensor(2), math.inf))
        with pytest.raises(TypeError, match=r"y as a torch\.Tensor, got list"):
            similarity.of_targets(network, x, y.tolist())

    def test_jacobian_that_is_not_finite(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(1).double())

            def forward(self, x):
                return (x.sum(-1) + self.bias).clamp_min(0.0).sqrt()

        x = inputs().abs()
        x[7] = 0.0
        with pytest.raises(ValueError, match=r"Jacobian is NaN or infinite at x_a, first in rows \[7\]"):
            similarity.of_tasks(Root(), x, x)

    @pytest.mark.parametrize("rank", [0, 2.0, True])
    def test_rank(self, rank):
        with pytest.raises(ValueError, match="rank, the number of directions"):
            similarity.of_tasks(make_network(), inputs(), inputs(), rank=rank)

    def test_resamples(self):
        with pytest.raises(ValueError, match="two at least, got 1"):
            similarity.of_targets(make_network(), inputs(), torch.randn(12), resamples=1)

    def test_a_layer_of_that_name(self):
        with pytest.raises(ValueError, match="A layer is called 'whole'"):
            similarity.of_targets(make_network(), inputs(), torch.randn(12), by=lambda _: "whole")

    def test_other_parameters(self):
        names = iter("ababab" + "bababa")  # those of one network, then those of the other
        with pytest.raises(ValueError, match="'whole', 'a', 'b' come in another order"):
            similarity.of_networks(make_network(), make_network(seed=1), inputs(), by=lambda _: next(names))


def test_token_ids_and_several_results():
    torch.manual_seed(0)

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 2)

        def forward(self, ids):
            return {"logits": self.head(self.embedding(ids).mean(1))}

    x = torch.randint(7, (6, 4))
    found = similarity.of_tasks(
        Tagger().double(), x, x.flip(0), input_dtype=torch.long, output=("logits", "all"), resamples=2
    )
    assert all(abs(layer.fisher.value - 1) < 1e-9 for layer in found)
