"""Starting JAX, with one line where it cannot start."""

import warnings

import jax

from granite_jax.errors import BackendError, one_line

_REFUSED = {
    "jax_debug_infs": "the model's masks and limits are infinite",
    "jax_no_tracing": "the model's programs are traced",
    "jax_no_execution": "the model's programs are executed",
}


def start_jax() -> None:
    """Starts the platform that JAX computes on, unless it runs already.

    Warns of `jax_disable_jit`, with which everything takes minutes.

    Raises:
      BackendError: its plugin is missing or fails, or another process has the device; or JAX has a setting with which
        the model cannot run.
    """
    for name, reason in _REFUSED.items():
        if getattr(jax.config, name):
            raise BackendError(f"JAX's setting {name} ({name.upper()}) is on, but {reason}: switch it off")
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        warnings.warn("JAX_DISABLE_JIT is on: nothing is compiled, and seconds of audio take minutes", stacklevel=2)
    try:
        jax.devices()
    except Exception as error:  # plugins raise anything
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        platform = f"the platform {platforms!r}" if platforms else "a platform"
        reason = one_line(error) or type(error).__name__
        advice = "is its plugin installed, and the device free? JAX_PLATFORMS=cpu computes on the CPU"
        raise BackendError(f"JAX cannot start {platform} ({reason}): {advice}") from None
