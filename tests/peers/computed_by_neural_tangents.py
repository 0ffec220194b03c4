"""What neural-tangents computes; runs in its environment, see :mod:`tests.peers.processes`."""

from __future__ import annotations

import sys
from types import ModuleType

# Its `experimental` subpackage imports TensorFlow, which nothing here needs.
sys.modules["neural_tangents.experimental"] = ModuleType("neural_tangents.experimental")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from neural_tangents import stax  # noqa: E402

Arrays = dict[str, np.ndarray]


def gradient_descent(question: Arrays) -> Arrays:
    """`gradient_descent_mse`, of outputs that a kernel (n, n', C, C) connects."""
    predict = nt.predict.gradient_descent_mse(jnp.asarray(question["matrix"]), question["y"], trace_axes=())
    at_train, at_test = predict(question["times"], question["start"], question["test_start"], question["cross"])
    return {"train": np.asarray(at_train), "test": np.asarray(at_test)}


def largest_rate(question: Arrays) -> Arrays:
    """`max_learning_rate`, of one output."""
    matrix = jnp.asarray(question["matrix"])
    return {"rate": np.asarray(nt.predict.max_learning_rate(matrix, y_train_size=len(matrix), eps=0.0))}


def empirical_kernels(question: Arrays) -> Arrays:
    """`empirical_ntk_fn`, of a tanh network with one hidden layer whose outputs are arranged as (n, 2, C / 2): a kernel
    for each choice of axes, which are numbers with spaces between them."""

    def network(weights: Arrays, x: jnp.ndarray) -> jnp.ndarray:
        hidden = jnp.tanh(x @ weights["0.weight"].T + weights["0.bias"])
        return (hidden @ weights["2.weight"].T + weights["2.bias"]).reshape(len(x), 2, -1)

    weights = {name: jnp.asarray(array) for name, array in question.items() if name.endswith(("weight", "bias"))}
    kernels = {}
    for k, choice in enumerate(zip(question["trace_axes"], question["diagonal_axes"], strict=True)):
        traced, diagonal = (tuple(map(int, str(axes).split())) for axes in choice)
        kernel = nt.empirical_ntk_fn(
            network,
            trace_axes=traced,
            diagonal_axes=diagonal,
            implementation=nt.NtkImplementation[str(question["implementation"])],
        )
        kernels[str(k)] = np.asarray(kernel(question["x"], question["test_x"], weights))
    return kernels


def infinite_width(question: Arrays) -> Arrays:
    """Both kernels of a fully connected network, and the distribution of infinitely wide ones in training."""
    activation = {"relu": stax.Relu, "erf": stax.Erf}[str(question["activation"])]
    options = {"W_std": float(question["weight_variance"]) ** 0.5, "b_std": float(question["bias_variance"]) ** 0.5}
    layers = [stax.Dense(1, **options)]
    for _ in range(int(question["layers"]) - 1):
        layers = [stax.Dense(1, **options), activation(), *layers]
    _, _, kernel = stax.serial(*layers)
    x, test_x = question["x"], question["test_x"]
    ensemble = nt.predict.gradient_descent_mse_ensemble(kernel, x, question["y"][:, None])
    trained = ensemble(t=float(question["time"]), x_test=test_x, get="ntk", compute_cov=True)
    return {
        "ntk": np.asarray(kernel(x, test_x, "ntk")),
        "nngp": np.asarray(kernel(x, test_x, "nngp")),
        "mean": np.asarray(trained.mean)[:, 0],
        "covariance": np.asarray(trained.covariance),
    }


if __name__ == "__main__":
    name, question_file, answer_file = sys.argv[1:]
    with np.load(question_file) as file:
        arrays = dict(file)
    np.savez(answer_file, **globals()[name](arrays))
