"""Eight emulated CPU devices, a compilation cache between runs, and array types checked at run time."""

import functools
import os
from collections.abc import Callable

import pytest

# Before anything imports jax: a machine with an accelerator, too, tests on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from flax import nnx
from jaxtyping import install_import_hook

DEVICES = 8
# Signatures of arrays are the model's and the decode loop's; host code in between only hands arrays on.
CHECKED = ["array_types", "model", "inference.programs", "decoding"]

install_import_hook([f"granite_jax.{module}" for module in CHECKED], "array_checks.check_signature")


def _promoting(function: Callable) -> Callable:
    """A function of a library that relies on implicit changes of dtype, under JAX's own rules for these."""

    @functools.wraps(function)
    def promoting(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoting


# It takes the float32 mean from bfloat16 activations.
nnx.LayerNorm.__call__ = _promoting(nnx.LayerNorm.__call__)


def pytest_configure(config: pytest.Config) -> None:
    """Configures jax before any test module is imported, hence before its backend starts."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Every change of dtype or rank is written down, or it is a mistake.
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # An entry that another run is just writing is compiled again, which is no failure.
        config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")
