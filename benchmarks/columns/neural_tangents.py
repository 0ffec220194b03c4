"""neural-tangents on JAX, jitted and warm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

# Its `experimental` subpackage imports TensorFlow, which nothing here needs.
sys.modules["neural_tangents.experimental"] = ModuleType("neural_tangents.experimental")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402

from . import fastest, jax_networks  # noqa: E402


class NeuralTangentsColumn:
    """Gram matrices by one of its implementations; products, for which it has one way only, by `empirical_ntk_vp_fn`.

    :param implementation: The name of an `NtkImplementation`.
    """

    def __init__(self, implementation: str):
        self.implementation = nt.NtkImplementation[implementation]
        self.has_products = self.implementation == nt.NtkImplementation.STRUCTURED_DERIVATIVES

    def prepare(self, case: dict, arrays: dict[str, np.ndarray]) -> None:
        jax.clear_caches()
        names = case["parameters"]
        tensors = {name.removeprefix("network."): a for name, a in arrays.items() if name.startswith("network.")}
        self.parameters = {name: jnp.asarray(tensors[name]) for name in names}
        constants = {name: jnp.asarray(tensors[name]) for name in tensors.keys() - set(names)}
        network = jax_networks.build(case["network"])
        self.function = lambda parameters, x: network({**constants, **parameters}, x)
        self.x = jnp.asarray(arrays["x"])
        self.kernel = nt.empirical_ntk_fn(self.function, trace_axes=(), vmap_axes=0, implementation=self.implementation)

    def gram(self, arrays: dict) -> Callable:
        gram = jax.jit(lambda x, parameters: self.kernel(x, None, parameters))
        return partial(gram, self.x, self.parameters)

    def diagonal(self, arrays: dict) -> Callable:
        def single(x: jax.Array, parameters: dict) -> jax.Array:
            return jnp.diagonal(self.kernel(x[None], None, parameters)[0, 0])

        diagonal = jax.jit(lambda x, parameters: jax.vmap(single, (0, None))(x, parameters).ravel())
        return partial(diagonal, self.x, self.parameters)

    def kernel_matmul(self, arrays: dict, columns: int) -> Callable:
        """The better of a loop over the columns and one vmap; a single column needs neither."""
        self._check_products()
        rhs = jnp.asarray(arrays["rhs"][:, :columns].T).reshape(columns, len(self.x), -1)

        def product(x: jax.Array, parameters: dict, column: jax.Array) -> jax.Array:
            return nt.empirical_ntk_vp_fn(self.function, x, None, parameters)(column)

        one = jax.jit(product)
        if columns == 1:
            return lambda: one(self.x, self.parameters, rhs[0]).reshape(-1, 1)
        together = jax.jit(jax.vmap(product, (None, None, 0)))
        stack = jax.jit(lambda results: jnp.stack(results).reshape(columns, -1).T)
        return fastest(
            lambda: jax.block_until_ready(stack([one(self.x, self.parameters, column) for column in rhs])),
            lambda: jax.block_until_ready(stack(list(together(self.x, self.parameters, rhs)))),
        )

    def jvp(self, arrays: dict) -> Callable:
        self._check_products()
        ends = np.cumsum([p.size for p in self.parameters.values()])
        pieces = jnp.split(jnp.asarray(arrays["tangent"]), ends[:-1])
        tangent = {n: piece.reshape(p.shape) for (n, p), piece in zip(self.parameters.items(), pieces, strict=True)}

        @jax.jit
        def apply(x: jax.Array, parameters: dict, tangent: dict) -> jax.Array:
            return jax.jvp(lambda w: self.function(w, x), (parameters,), (tangent,))[1].ravel()

        return partial(apply, self.x, self.parameters, tangent)

    def vjp(self, arrays: dict) -> Callable:
        self._check_products()
        cotangent = jnp.asarray(arrays["rhs"][:, 0])

        @jax.jit
        def apply(x: jax.Array, parameters: dict, cotangent: jax.Array) -> jax.Array:
            out, pull = jax.vjp(lambda w: self.function(w, x), parameters)
            (pieces,) = pull(cotangent.reshape(out.shape))
            return jnp.concatenate([pieces[name].ravel() for name in self.parameters])

        return partial(apply, self.x, self.parameters, cotangent)

    def synchronize(self, result: jax.Array) -> None:
        jax.block_until_ready(result)

    def to_numpy(self, result: jax.Array) -> list[np.ndarray]:
        array = np.asarray(result)
        if array.ndim == 4:  # (n, n, C, C) to the point-major (n·C, n·C) of every other column
            size = array.shape[0] * array.shape[2]
            array = array.transpose(0, 2, 1, 3).reshape(size, size)
        return [array]

    def _check_products(self) -> None:
        if not self.has_products:
            raise NotImplementedError("the same in every implementation")
