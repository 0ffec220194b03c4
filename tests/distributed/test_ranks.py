"""What holds of ranks that work together: bytes, memory, errors, and what is left when they have ended."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpytorch.mlls import ExactMarginalLogLikelihood

import ntk_gp
from ntk_gp import NTKKernel, draw_functions
from ntk_gp.distributed import jacobian as sharded
from ntk_gp.distributed.group import Group
from ntk_gp.distributed.jacobian import ShardedJacobian
from ntk_gp.distributed.replicated import same_on_all_ranks
from ntk_gp.distributed.traffic import Traffic
from ntk_gp.solvers import System
from ntk_gp.solvers.weight_space import feature_moment
from tests.adapted import LARGE, assert_close, data, network
from tests.classification.problems import Problem
from tests.distributed import problems
from tests.distributed.harness import ranks
from tests.distributed.problems import Results

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]

N, OUTPUTS = 18, 2  # so that four ranks have unlike shares
PRECISE = ntk_gp.settings.solve_tolerance(1e-12)
# Engines and memory budgets: factors that are held, and captured chunk by chunk, and none.
CASES = (("structured", "1GB"), ("structured", 60_000), ("autodiff", "1GB"))


# Four ranks.


def operations(n: int) -> list[str]:
    """Products and Gram matrices of all kinds of Jacobians, against those of one process; names of what differs."""
    found = []
    sharded.TILE = 200 if n == N else 1 << 24  # of many tiles, and of one
    x, test_x = data(n)[0].unsqueeze(0), data(3, seed=1)[0].unsqueeze(0)
    generator = torch.Generator().manual_seed(0)
    for engine, budget in CASES if n == N else CASES[:1]:
        kernel = NTKKernel(network(outputs=OUTPUTS), output="all", engine=engine, variance_groups="layer")
        shared = kernel._linearization
        with ntk_gp.settings.memory_budget(budget):
            alone, elsewhere = shared.jacobian(x), shared.jacobian(test_x)
            variances = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
            u = torch.randn(1, 3, alone.function.num_parameters, dtype=torch.float64, generator=generator)
            v = torch.randn(1, 3, alone.num_rows, dtype=torch.float64, generator=generator)
            with ntk_gp.settings.distributed(timeout=20):
                together = shared.jacobian(x)
                other = shared.jacobian(x[:, : n // 2])
                assert isinstance(together, ShardedJacobian) and shared.jacobian(x) is together
                half = alone[slice(0, n // 2)]
                pairs = {
                    "jvp": (together.jvp(u), alone.jvp(u)),
                    "vjp": (together.vjp(v), alone.vjp(v)),
                    "rows": (together.rows(), alone.rows()),
                    "diagonal": (together.diagonal(variances), alone.diagonal(variances)),
                    "cross_diagonal": (together.cross_diagonal(alone, variances), alone.diagonal(variances)),
                    "gram": (together.gram(together, variances), alone.gram(alone, variances)),
                    "gram between": (together.gram(other, variances), alone.gram(half, variances)),
                    "gram elsewhere": (together.gram(elsewhere, variances), alone.gram(elsewhere, variances)),
                    "gram from there": (elsewhere.gram(together, variances), elsewhere.gram(alone, variances)),
                    "some points": (together[slice(2, 5)].rows(), alone[slice(2, 5)].rows()),
                    "own row blocks": (
                        together.shards.gathered(torch.cat([r for _, r in together.own.row_blocks()], 1), 1),
                        alone.rows(),
                    ),
                }
                for turn in range(6 if (engine, budget) == CASES[0] else 1):  # K is kept once that pays
                    product = shared.kernel_matmul(together, together, v.mT, variances)
                    pairs[f"kernel_matmul {turn}"] = (product, alone.kernel_matmul(alone, v.mT, variances))
                product = shared.kernel_matmul(elsewhere, together, v.mT, variances)
                pairs["kernel_matmul elsewhere"] = (product, elsewhere.kernel_matmul(alone, v.mT, variances))
        for name, (actual, expected) in pairs.items():
            if not (actual - expected).abs().max() <= 1e-12 * expected.abs().max():
                found.append(f"{engine} {budget} {name}")
        assert shared.jacobian(x) is not together, "what is kept for ranks together is not for one alone"
    return found


@pytest.mark.parametrize("n", [N, 4])
def test_operations(four, n):
    assert four.run(operations, n) == [[]] * 4


def traffic(n: int) -> tuple[dict[str, int], dict[str, int]]:
    """What was sent, and what the model says."""
    kernel = NTKKernel(network(outputs=OUTPUTS), output="all")
    x, test_x = data(n)[0].unsqueeze(0), data(3, seed=1)[0].unsqueeze(0)
    shared, sent = kernel._linearization, {}
    elsewhere = shared.jacobian(test_x)
    one = torch.ones(1, 1, dtype=torch.float64)
    with ntk_gp.settings.distributed(timeout=20) as group:
        jacobian = shared.jacobian(x)
        parameters = jacobian.function.num_parameters
        u, v = x.new_ones(1, 2, parameters), x.new_ones(1, 2, jacobian.num_rows)
        system = System(shared, x, one, x.new_ones(1, jacobian.num_rows))
        assert system.jacobian is jacobian
        model = Traffic(n, OUTPUTS, parameters, group.size)
        calls = {
            "jvp": (lambda: jacobian.jvp(u), model.jvp(2)),
            "vjp": (lambda: jacobian.vjp(v), model.vjp(2)),
            "kernel_matmul": (lambda: jacobian.kernel_matmul(jacobian, v.mT, one), model.kernel_matmul(2)),
            "own_gram": (lambda: jacobian.own_gram(jacobian, one), model.own_gram(group.rank)),
            "gram": (lambda: jacobian.gram(jacobian, one), model.gram(group.rank)),
            "cross": (lambda: jacobian.gram(elsewhere, one), model.cross(3 * OUTPUTS)),
            "feature_moment": (
                lambda: feature_moment(system, keep=False),
                model.feature_moment(),
            ),
        }
        for name, (call, _) in calls.items():
            group.traffic.clear()
            call()
            sent[name] = group.traffic.total()
    return sent, {name: expected for name, (_, expected) in calls.items()}


@pytest.mark.parametrize("n", [16, N])
def test_bytes_are_those_of_the_model(four, n):
    for sent, expected in four.run(traffic, n):
        assert sent == expected


def held() -> tuple[int, int]:
    """Bytes of factors, of this process alone and with others."""
    shared = NTKKernel(network())._linearization
    x = data(64)[0].unsqueeze(0)
    alone = shared.jacobian(x).nbytes
    with ntk_gp.settings.distributed(timeout=20):
        return alone, shared.jacobian(x).nbytes


def test_memory_falls_with_ranks(four):
    for alone, together in four.run(held):
        assert together <= alone / 4 + 1000


# Users' work.


def trained() -> tuple[bytes, dict[str, torch.Tensor]]:
    """A few steps of training, and what is left: the checkpoint of the first rank, and predictions."""
    torch.manual_seed(int(os.getpid()))  # what is drawn is the first rank's, all the same
    with ntk_gp.settings.distributed(timeout=20) as group:
        model = problems.model_of("scaled", LARGE)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        parameters = list(model.parameters())
        for _ in range(3):
            loss = -mll(model(*model.train_inputs), model.train_targets)
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.data -= 0.1 * gradient  # importing torch.optim takes longer
        model.eval()
        x = data(5, seed=1)[0]
        adapted = ntk_gp.adapted_network(model)
        with torch.no_grad():
            found = {
                "mean": model(x).mean,
                "variance": model(x).variance,
                "functions": draw_functions(model, 4)(x),
                "samples": model(x).rsample(torch.Size([3])),
                "adapted": adapted(x),
            }
        for name, value in found.items():
            group.agree(name, value)
        checkpoint = io.BytesIO()
        torch.save({"model": model.state_dict(), "adapted": adapted.state_dict()}, checkpoint)
        return checkpoint.getvalue(), found


def differentiated() -> dict[str, torch.Tensor]:
    """Samples of prior and posterior with gradients, by random numbers that were seeded apart."""
    torch.manual_seed(dist.get_rank())
    found = {}
    with ntk_gp.settings.distributed(timeout=20) as group:
        for kernel in ("scaled", "gain"):
            model = problems.model_of(kernel, LARGE)
            for name, distribution in (
                ("prior", model.train()(*model.train_inputs)),
                ("posterior", model.eval()(data(5, seed=1)[0])),
            ):
                sample = distribution.rsample(torch.Size([2]))
                group.agree(f"{name} of {kernel}", sample.detach())
                found[f"{name} of {kernel}"] = sample.detach()
                if name == "prior":
                    gradients = torch.autograd.grad(sample.square().sum(), list(model.covar_module.parameters()))
                    group.agree(f"gradients of the {name} of {kernel}", *gradients)
        after = torch.rand(3)  # of each rank's own
    return found | {"after": after}


def rounded_apart() -> tuple[torch.Tensor, torch.Tensor]:
    """A draw that each rank has computed with rounding errors of its own, and its derivative."""
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    normals = torch.linspace(-2, 2, 9, dtype=torch.float64) * (1 + 1e-15 * dist.get_rank())
    with ntk_gp.settings.distributed(timeout=20):
        drawn = same_on_all_ranks(scale * normals)
        assert torch.equal(same_on_all_ranks((scale * normals).detach()), drawn.detach())
        (gradient,) = torch.autograd.grad(drawn.square().sum(), scale)
    return drawn.detach(), gradient


def test_draws_have_the_first_ranks_bits(two):
    (drawn, gradient), (other, others_gradient) = two.run(rounded_apart)
    assert torch.equal(drawn, other)
    assert torch.equal(drawn, 3 * torch.linspace(-2, 2, 9, dtype=torch.float64))
    torch.testing.assert_close(gradient, others_gradient, rtol=1e-14, atol=0)
    assert gradient.item() == pytest.approx(float(2 * drawn.square().sum() / 3))


def test_samples_with_gradients_are_the_same_however_ranks_are_seeded(two):
    one, other = two.run(differentiated)
    assert not torch.equal(one.pop("after"), other.pop("after"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert one["prior of gain"].std() > 0


def test_a_checkpoint_serves_one_process(two):
    checkpoint, found = two.run(trained)[0]
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    model, x = problems.model_of("scaled", LARGE), data(5, seed=1)[0]
    model.load_state_dict(state["model"])
    model.eval()
    with torch.no_grad():
        assert_close(model(x).mean, found["mean"], 1e-10)
        assert_close(model(x).variance, found["variance"], 1e-10)
        adapted = ntk_gp.adapted_network(model)
        adapted.load_state_dict(state["adapted"])
        assert_close(adapted(x), found["adapted"], 1e-10)


def pickled(solver: str | None, fast: bool) -> tuple[bytes, Results]:
    """A model that has predicted, and what."""
    with ntk_gp.settings.distributed(timeout=20), ntk_gp.settings.solver(solver), PRECISE:
        model = problems.model_of("scaled", LARGE)
        found = problems.predictions(model, fast)
        return pickle.dumps(copy.deepcopy(model)), found


@pytest.mark.parametrize(
    ("solver", "fast"),
    [("iterative", False), ("distributed", False), ("distributed_weight_space", False), (None, True)],
)
def test_a_pickled_model_serves_one_process(two, solver, fast):
    model, found = two.run(pickled, solver, fast)[0]
    with PRECISE:
        predicted = problems.predictions(pickle.loads(model), fast)
    for name, value in predicted.items():
        assert_close(value, found[name])


def with_garbage() -> int:
    """What a kernel has captured whose predecessor waits for the garbage collector on one rank, and is gone on the
    other."""
    net, x = network(), data(8)[0].unsqueeze(0)
    gc.disable()
    with ntk_gp.settings.distributed(timeout=20):
        held: list = [NTKKernel(net)]
        held[0]._linearization.jacobian(x)
        if dist.get_rank() == 0:
            held.append(held)
        else:
            held.clear()
            gc.collect()
        del held
        rows = NTKKernel(net)._linearization.jacobian(x).num_rows
    gc.enable()
    return rows


def test_garbage_makes_no_difference(two):
    assert two.run(with_garbage) == [8, 8]


def example(source: str, folder: str) -> torch.Tensor:
    """What the script of the guide predicts, within a group that there is already."""
    names: dict = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(source.replace("dist.init_process_group", "str"), names)
    finally:
        os.chdir(before)
    return torch.stack([names["mean"], names["variance"]])


def test_the_guide(two, tmp_path):
    page = Path(ntk_gp.__file__).parents[1] / "docs" / "distributed.md"
    (source,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    one, other = two.run(example, source, str(tmp_path))
    assert torch.equal(one, other)
    assert set(torch.load(tmp_path / "adapted.pt", weights_only=True)) == {"model", "adapted"}


def classified(space: str) -> float:
    """How far a classifier's probabilities and evidence are from those of one process."""
    values = []
    for group in (False, None):
        problem = Problem("softmax", n=9)
        with ntk_gp.settings.distributed(group, timeout=20), ntk_gp.settings.solver(space):
            model = problem.model()
            evidence = model.approximation.log_evidence()
            latent = model.eval()(problem.test_x)
            found = (evidence, latent.mean, latent.variance)
            values.append(torch.cat([value.detach().reshape(-1) for value in found]))
    return float((values[0] - values[1]).abs().max())


@pytest.mark.parametrize("space", ["function_space", "weight_space"])
def test_classification(two, space):
    assert max(two.run(classified, space)) < 1e-9


# Errors.


def test_without_process_groups():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ntk_gp.settings.distributed()


def test_one_rank_is_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        model = problems.model_of("scaled")
        expected = problems.everything(model)
        with ntk_gp.settings.distributed() as group:
            assert isinstance(group, Group) and group.size == 1
            found = problems.everything(problems.model_of("scaled"))
            assert ntk_gp.settings.distributed.group() is group
            with ntk_gp.settings.distributed(dist.group.WORLD, timeout=5) as again:
                assert again is group, "what is kept belongs to it"
                assert group.timeout == 5
            assert group.timeout == 600
            with ntk_gp.settings.distributed(False):
                assert ntk_gp.settings.distributed.group() is None
        assert group.traffic.total() == 0
        for name, value in found.items():
            assert torch.equal(value, expected[name])
    finally:
        dist.destroy_process_group()


def of_targets(rank: int) -> None:
    model = problems.model_of("scaled")
    model.train_targets[3] += 1e-9 * rank
    model.eval()(data(2)[0])


def of_a_density(rank: int) -> None:
    model = problems.model_of("scaled")
    model.train()(*model.train_inputs).log_prob(model.train_targets + 1e-9 * rank)


def of_base_samples(rank: int) -> None:
    model = problems.model_of("scaled")
    model.train()(*model.train_inputs).rsample(base_samples=torch.full_like(model.train_targets, rank))


def of_labels(rank: int) -> None:
    model = Problem("softmax").model()
    labels = model.train_targets.clone()
    labels[0] = (labels[0] + rank) % 3
    model.set_train_data(targets=labels)
    model.eval().latent_posterior()


# What users give to each rank.
GIVEN = {
    "training targets": of_targets,
    "values of which the density is asked for": of_a_density,
    "base samples": of_base_samples,
    "labels": of_labels,
}


def disagreeing(what: str) -> str:
    rank = dist.get_rank()
    net = network(seed=rank if what == "network's parameters" else 0)
    x = data(8, seed=rank if what == "inputs" else 0)[0].unsqueeze(0)
    with ntk_gp.settings.distributed(timeout=20):
        try:
            if what == "prior variances and noise":
                model = problems.model_of("scaled")
                model.likelihood.noise = 0.1 + rank
                problems.predictions(model)
            if what in GIVEN:
                GIVEN[what](rank)
            NTKKernel(net)._linearization.jacobian(x)
        except RuntimeError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["inputs", "network's parameters", "prior variances and noise", *GIVEN])
def test_ranks_must_agree(two, what):
    for message in two.run(disagreeing, what):
        assert f"same {what}" in message and "of 2 ranks 1 differ" in message


def late() -> tuple[str, float]:
    """The last rank comes too late."""
    rank = dist.get_rank()
    among = dist.new_group()
    start = time.monotonic()
    if rank == 1:
        time.sleep(3)
        return "", 0.0
    try:
        with ntk_gp.settings.distributed(among, timeout=1) as group:
            group.sum(torch.ones(2))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def dead() -> tuple[str, float]:
    """The last rank ends."""
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    try:
        with ntk_gp.settings.distributed(timeout=30):
            NTKKernel(network())._linearization.jacobian(data(8)[0].unsqueeze(0))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_a_rank_that_fails_makes_others_raise():
    with ranks(2) as started:
        message, _ = started.run(late)[0]
        assert "did not come" in message and "1 s behind" in message
        started.start(dead)
        is_fine, (message, seconds) = started.answer(0)
        assert is_fine and "did not come" in message and "one of them has failed" in message
        assert seconds < 20
