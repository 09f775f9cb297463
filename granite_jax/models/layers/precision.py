"""In which dtype and with which precision a model's functions compute."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from granite_jax.array_types import Params


def with_matmul_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function `(config, params, ..., dtype=None)`: float32 computes at the highest precision.

    `dtype` is what activations are computed in, by default that of the weights. TPUs and GPUs multiply float32 matrices
    with less precision unless this is set while the function is traced. Integers of 64 bits, which NumPy and JAX's x64
    mode make of lengths and tokens, become 32 bits.
    """

    @functools.wraps(function)
    def wrapped(config: Any, params: Params, *args: Any, dtype: DTypeLike | None = None, **kwargs: Any) -> Any:
        chosen = jnp.dtype(dtype or dtype_of(params))
        args, kwargs = jax.tree.map(_narrowed, (args, kwargs))
        with jax.default_matmul_precision("highest" if chosen == jnp.float32 else "default"):
            return function(config, params, *args, dtype=chosen, **kwargs)

    return wrapped


def dtype_of(params: Any) -> Any:
    """The dtype of the first leaf of floats: quantized weights are integers."""
    return next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _narrowed(leaf: Any) -> Any:
    return leaf.astype(jnp.int32) if getattr(leaf, "dtype", None) == np.int64 else leaf
