"""The networks of `benchmarks.networks` again, as plain JAX functions of the same parameters by the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

IMAGE_SHAPE = (3, 32, 32)
SEQUENCE_SHAPE = (16, 8)
NUM_HEADS = 4
NORM_EPS = 1e-5

Tensors = Mapping[str, jax.Array]


def build(name: str) -> Callable[[Tensors, jax.Array], jax.Array]:
    """f(tensors, x), (n, d) to (n, C), for a name as in `benchmarks.networks.build`."""
    return {"resnet20": resnet20, "transformer": transformer}.get(name, mlp)


def mlp(tensors: Tensors, x: jax.Array) -> jax.Array:
    layers = range(len(tensors) // 2)
    for layer in layers:
        x = linear(tensors, str(2 * layer), x)
        if layer != layers[-1]:
            x = jnp.tanh(x)
    return x


def resnet20(tensors: Tensors, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, *IMAGE_SHAPE)
    x = jax.nn.relu(batch_norm(tensors, "2", convolution(tensors, "1", x)))
    for block in range(9):
        x = residual_block(tensors, str(4 + block), x, stride=2 if block in (3, 6) else 1)
    return linear(tensors, "15", x.mean((2, 3)))


def residual_block(tensors: Tensors, name: str, x: jax.Array, stride: int) -> jax.Array:
    hidden = jax.nn.relu(batch_norm(tensors, f"{name}.bn1", convolution(tensors, f"{name}.conv1", x, stride)))
    hidden = batch_norm(tensors, f"{name}.bn2", convolution(tensors, f"{name}.conv2", hidden))
    if stride > 1:
        x = batch_norm(tensors, f"{name}.shortcut.1", convolution(tensors, f"{name}.shortcut.0", x, stride))
    return jax.nn.relu(hidden + x)


def transformer(tensors: Tensors, x: jax.Array) -> jax.Array:
    hidden = linear(tensors, "embedding", x.reshape(-1, *SEQUENCE_SHAPE)) + tensors["position"]
    for layer in range(2):
        name = f"layers.{layer}"
        hidden = layer_norm(tensors, f"{name}.norm1", hidden + attention(tensors, f"{name}.self_attn", hidden))
        feedforward = linear(tensors, f"{name}.linear2", jax.nn.relu(linear(tensors, f"{name}.linear1", hidden)))
        hidden = layer_norm(tensors, f"{name}.norm2", hidden + feedforward)
    return linear(tensors, "head", hidden.mean(1))


def attention(tensors: Tensors, name: str, x: jax.Array) -> jax.Array:
    num_points, length, width = x.shape
    projected = times_transposed(x, tensors[f"{name}.in_proj_weight"]) + tensors[f"{name}.in_proj_bias"]
    heads = projected.reshape(num_points, length, 3, NUM_HEADS, width // NUM_HEADS)
    query, key, value = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
    scores = jnp.einsum("nthd,nshd->nhts", query, key) / jnp.sqrt(width // NUM_HEADS)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, -1), value)
    return linear(tensors, f"{name}.out_proj", mixed.reshape(num_points, length, width))


def linear(tensors: Tensors, name: str, x: jax.Array) -> jax.Array:
    return times_transposed(x, tensors[f"{name}.weight"]) + tensors[f"{name}.bias"]


def times_transposed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`, with no transposition of the parameter: that would hide its structure from neural-tangents, whose
    structured derivatives then take 40 times as long."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def convolution(tensors: Tensors, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    weight = tensors[f"{name}.weight"]
    padding = [(weight.shape[-1] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(x, weight, (stride, stride), padding)


def batch_norm(tensors: Tensors, name: str, x: jax.Array) -> jax.Array:
    """In eval mode."""

    def channels(kind: str) -> jax.Array:
        return tensors[f"{name}.{kind}"][:, None, None]

    normal = (x - channels("running_mean")) / jnp.sqrt(channels("running_var") + NORM_EPS)
    return normal * channels("weight") + channels("bias")


def layer_norm(tensors: Tensors, name: str, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPS)
    return normal * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
