"""Signals: commands end within seconds, whatever they do, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from granite_jax.batch.reader_processes import Closed, Killed, ReaderProcesses
from granite_jax.cli import signals
from granite_jax.files.atomic import new_directory

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
NAMES = [number.name for number in SIGNALS]
# What a command can be doing: Python's handlers do not run while a compiler works in the main thread.
WORK = {
    "Python": "while True: time.sleep(0.01)",
    "a compiler": "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)",
    "threads at its end": "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
    "a job": "with signals.defer_signals() as stop:\n            while True: time.sleep(0.01)",
    "an import": "sys.path.insert(0, work.name); pathlib.Path(work.name, 'slow.py').write_text("
    "'import time\\nwhile True: time.sleep(0.01)'); import slow",
    "a destructor": "type('Slow', (), {'__del__': lambda _: time.sleep(60)})()",
}
COMMAND = """
import hashlib, multiprocessing, os, pathlib, sys, tempfile, threading, time
from granite_jax.cli import signals

if __name__ == "__main__":
    signals._GRACE = 0.3
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    work = tempfile.TemporaryDirectory(prefix=f"granite-jax-{{os.getpid()}}-")
    print(child.pid, work.name, flush=True)
    with signals.exit_on_signals(), work:
        {work}
"""

IMPORTS = """
import signal, sys
from granite_jax import cli

class Finder:
    def find_spec(self, name, *_):
        if name == "granite_jax.cli.commands":
            signal.raise_signal({number})

sys.meta_path.insert(0, Finder())
cli.main()
"""


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """No signal is ignored, as if the tests were not run in the background: the processes of tests inherit this."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within 5 seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


@pytest.mark.parametrize(
    ("work", "number"),
    [(work, number) for work in WORK for number in SIGNALS if number == signal.SIGINT or work in list(WORK)[:4]],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_command_ends_with_its_processes(work: str, number: signal.Signals, tmp_path: Path) -> None:
    # Given a command that does something long, with a process and temporary files of its own
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(work=WORK[work]))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        child, directory = command.stdout.readline().split()
        time.sleep(0.2)
        # When it gets a signal, then it ends with this signal's status
        command.send_signal(number)
        assert command.wait(5) == 128 + number
        # And says so in one line, and nothing is left
        resumes = "" if work != "a job" else ", amid its work; run again to resume"
        assert command.stderr.read() == f"granite-jax: stopped by {number.name}{resumes}\n"
    assert is_gone(int(child))
    assert not Path(directory).exists()


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
def test_a_signal_while_modules_are_imported_ends_the_process(number: signal.Signals) -> None:
    # Given a command whose modules are just imported, when a signal comes, then one line and the status say so
    command = [sys.executable, "-c", IMPORTS.format(number=int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, f"granite-jax: stopped by {number.name}\n")


@pytest.fixture
def no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the process of the tests from being ended."""
    monkeypatch.setattr(signals, "_GRACE", 1e6)


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    # Given a signal that is ignored, as by nohup, when it comes, then nothing happens
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.exit_on_signals(), signals.defer_signals() as stop:
            signal.raise_signal(number)
        assert not stop()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
@pytest.mark.usefixtures("no_deadline")
def test_a_second_signal_interrupts_what_is_polled(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    # Given work that polls, when a signal comes, then it is told; and a second one ends it at once
    with pytest.raises(SystemExit) as ended, signals.exit_on_signals(), signals.defer_signals() as stop:
        signal.raise_signal(number)
        assert stop() and (stop.name, stop.status) == (number.name, 128 + number)
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"granite-jax: stopped by {number.name}\n"


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
@pytest.mark.usefixtures("no_deadline")
def test_an_interrupted_conversion_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    # Given a directory that is being written, when a signal comes, then nothing is left of it
    with pytest.raises(SystemExit), signals.exit_on_signals(), new_directory(tmp_path / "new") as partial:
        (partial / "config.json").write_text("{}")
        signal.raise_signal(number)
    assert not list(tmp_path.iterdir())


def slow_pid(seconds: float) -> int:
    if seconds < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return os.getpid()


PARENT = """
import os, signal, sys
from test_signals import ReaderProcesses, slow_pid

if __name__ == "__main__":
    print(ReaderProcesses(slow_pid, 1)(0), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    # Given a parent that is killed, when it is gone, then its reader process is gone, too
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone(int(done.stdout))


def test_processes_end_when_they_are_told_to() -> None:
    # Given processes, one of which is killed by its item
    processes = ReaderProcesses(slow_pid, 1)
    first = processes(0)
    with pytest.raises(Killed):
        processes(-1)
    # When another item comes, then a new process does it; after the end, none does, and all are gone
    second = processes(0)
    assert first != second and is_gone(first)
    processes.close()
    with pytest.raises(Closed):
        processes(0)
    assert is_gone(second)
