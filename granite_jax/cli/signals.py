"""SIGTERM, SIGINT and SIGHUP: a command ends within seconds, and leaves no processes or temporary files behind."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from granite_jax.cli import SIGNALS
from granite_jax.cli.terminal import fail

_GRACE = 3.0  # seconds from a signal to the end of the process, whatever it is doing
_resumable = False  # whether the command is a job, which can be run again
_told = False  # whether the command has said what stopped it


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

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


@contextlib.contextmanager
def defer_signals() -> Iterator[Stop]:
    """Within this block signals do not interrupt: what it yields says whether one came. A second one interrupts.

    It is for jobs that can be run again, and go on then.
    """
    global _resumable
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.received is not None:
            _interrupt(number, frame)
        stop.received = signal.Signals(number)

    _resumable = True
    try:
        with _handler(receive):
            yield stop
    finally:
        _resumable = False


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Within this block a signal raises SystemExit. Some seconds after a signal the process ends, whatever it does.

    Python runs a handler between two steps of the main thread, which can wait for a compiler or a device for minutes.
    Another thread therefore watches for signals, too.
    """
    global _told
    _told = False
    watched, written = socket.socketpair()
    written.setblocking(False)
    threading.Thread(target=_watch, args=(watched, _GRACE), daemon=True).start()
    previous = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    report, sys.unraisablehook = sys.unraisablehook, _leave_if_lost
    try:
        with _handler(_interrupt):
            yield
    except _Interrupt as interrupt:
        _told = True
        fail(f"stopped by {signal.Signals(interrupt.number).name}")
        raise
    finally:
        sys.unraisablehook = report
        signal.set_wakeup_fd(previous)
        written.close()


@contextlib.contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sets the handler of all signals but those that are ignored, as nohup and shells have it in the background."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    changed = [number for number in SIGNALS if previous[number] != signal.SIG_IGN]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, previous[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number)  # an exception amid the import of an extension can crash it
        frame = frame.f_back
    raise _Interrupt(number)


def _leave_if_lost(lost: "sys.UnraisableHookArgs") -> None:
    """Ends the process if the exception of a signal came where none can be raised, as in a destructor."""
    if isinstance(lost.exc_value, _Interrupt):
        _leave(lost.exc_value.number)
    sys.__unraisablehook__(lost)


def _watch(received: socket.socket, grace: float) -> None:
    """Reads the numbers of signals; ends the process some seconds after the first one that is not ignored."""
    with received:
        while data := received.recv(1):
            if data[0] in SIGNALS and signal.getsignal(data[0]) != signal.SIG_IGN:
                time.sleep(grace)
                _leave(data[0])


def _leave(number: int) -> None:
    """Ends the process with all that it has started."""
    for process in multiprocessing.active_children():
        process.kill()
    for directory in Path(tempfile.gettempdir()).glob(f"granite-jax-{os.getpid()}-*"):
        shutil.rmtree(directory, ignore_errors=True)
    message = f"stopped by {signal.Signals(number).name}" + (_resumable * ", amid its work; run again to resume")
    if not _told:
        printing = threading.Thread(target=fail, args=(message,), daemon=True)
        printing.start()
        printing.join(0.5)  # nobody may be reading
    os._exit(128 + number)
