"""Starting JAX, with one line where it cannot start."""

import jax

from granite_jax.audio.resample import one_line
from granite_jax.errors import BackendError


def start_jax() -> None:
    """Starts the platform that JAX computes on, unless it runs already.

    Raises:
      BackendError: its plugin is missing or fails, or another process has the device.
    """
    try:
        jax.devices()
    except Exception as error:  # plugins raise anything
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        platform = f"the platform {platforms!r}" if platforms else "a platform"
        reason = one_line(error) or type(error).__name__
        advice = "is its plugin installed, and the device free? JAX_PLATFORMS=cpu computes on the CPU"
        raise BackendError(f"JAX cannot start {platform} ({reason}): {advice}") from None
