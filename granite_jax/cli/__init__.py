"""The `granite-jax` command.

This module imports next to nothing: what it does first is to say what signals do while all others are imported.
"""

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from granite_jax.cli.commands import app

__all__ = ["app", "main"]

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Entry point of the console script."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells have it in the background
            signal.signal(number, _leave)
    from granite_jax.cli import commands

    commands.run()


def _leave(number: int, frame: "FrameType | None") -> None:
    """Ends the process at once: an exception amid the import of an extension can crash it."""
    try:
        os.write(2, f"granite-jax: stopped by {signal.Signals(number).name}\n".encode())
    finally:
        os._exit(128 + number)


def __getattr__(name: str) -> "Any":
    if name == "app":
        from granite_jax.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
