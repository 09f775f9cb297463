"""SIGTERM, SIGINT and SIGHUP: a command ends within seconds, and leaves no processes or temporary files behind."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from granite_jax.cli.terminal import fail

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_GRACE = 3.0  # seconds from a signal to the end of the process, whatever it is doing


class Stop:
    """Whether, and by which signal, a command was asked to stop."""

    received: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def name(self) -> str:
        """The signal's name."""
        return self.received.name if self.received is not None else ""

    @property
    def status(self) -> int:
        """The exit status of a command that was stopped."""
        return 128 + (self.received or 0)


class _Interrupt(SystemExit):
    """A signal ends the command; the exit status says which."""


@contextlib.contextmanager
def defer_signals() -> Iterator[Stop]:
    """Within this block signals do not interrupt: what it yields says whether one came. A second one interrupts."""
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.received is not None:
            _interrupt(number, frame)
        stop.received = signal.Signals(number)

    with _handler(receive):
        yield stop


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Within this block a signal raises SystemExit. Some seconds after a signal the process ends, whatever it does.

    Python runs a handler between two steps of the main thread, which can wait for a compiler or a device for minutes.
    Another thread therefore watches for signals, too.
    """
    watched, written = socket.socketpair()
    written.setblocking(False)
    threading.Thread(target=_watch, args=(watched, _GRACE), daemon=True).start()
    previous = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        with _handler(_interrupt):
            yield
    except _Interrupt as interrupt:
        fail(f"stopped by {signal.Signals(int(str(interrupt)) - 128).name}")
        raise
    finally:
        signal.set_wakeup_fd(previous)
        written.close()


@contextlib.contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sets the handler of all signals but those that are ignored, as nohup and shells have it in the background."""
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    changed = [number for number in _SIGNALS if previous[number] != signal.SIG_IGN]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, previous[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupt(128 + number)


def _watch(received: socket.socket, grace: float) -> None:
    """Reads the numbers of signals; ends the process some seconds after the first one that is not ignored."""
    with received:
        while data := received.recv(1):
            if data[0] in _SIGNALS and signal.getsignal(data[0]) != signal.SIG_IGN:
                time.sleep(grace)
                _leave(data[0])


def _leave(number: int) -> None:
    """Ends the process with all that it has started."""
    for process in multiprocessing.active_children():
        process.kill()
    for directory in Path(tempfile.gettempdir()).glob(f"granite-jax-{os.getpid()}-*"):
        shutil.rmtree(directory, ignore_errors=True)
    message = f"stopped by {signal.Signals(number).name}, amid its work; a job that is run again goes on"
    printing = threading.Thread(target=fail, args=(message,), daemon=True)
    printing.start()
    printing.join(0.5)  # nobody may be reading
    os._exit(128 + number)
