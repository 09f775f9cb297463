"""Commits parts, and keeps the finished lines of those in which a worker is stopped or killed.

    unfinished-000007-FINGERPRINT-1a2b3c4d.jsonl      lines of part 7
    unfinished-000007-FINGERPRINT.r1-5e6f7a8b.jsonl   lines of its first retry

Such a file is created once, with lines that no other file of its worker has, and deleted when its part is committed.
There is none of a part that takes less than `SAVE_SECONDS`. The next worker of the part takes over the lines of all of
them.
"""

import collections
import dataclasses
import itertools
import re
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from granite_jax.batch.committed import TASK, Line, intact_lines, part_name, task_name
from granite_jax.batch.reading import Task
from granite_jax.batch.store import Store

SAVE_SECONDS = 30.0
"""How long a finished line waits for the rest of its part before it is saved."""
_NAME = re.compile(rf"unfinished-{TASK}-[0-9a-f]{{8}}\.jsonl")
_THREADS = 8  # that write to the store


@dataclasses.dataclass(eq=False)
class StartedTask:
    """A task in progress.

    Fields:
      lines: those that are there, by index.
      kept: number of lines that are from former runs.
      unsaved: lines of this run that would be lost with the worker, but not errors, which the next one shall retry.
      waiting_since: when the first of these was finished, in seconds of the monotonic clock.
      files: names of the files with lines of this run, which are being written.
      audio_seconds: seconds of audio transcribed in this run.
    """

    task: Task
    lines: dict[int, bytes] = dataclasses.field(default_factory=dict)
    kept: int = 0
    unsaved: list[bytes] = dataclasses.field(default_factory=list)
    waiting_since: float = 0.0
    files: list[Future[str]] = dataclasses.field(default_factory=list)
    audio_seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether all lines are there."""
        return len(self.lines) == len(self.task.indices)


def unfinished_files(names: Iterable[str], fingerprint: str) -> dict[tuple[int, int], list[str]]:
    """Names of the files with lines of a job's tasks, by their part and retry."""
    files = collections.defaultdict(list)
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is not None and match[2] == fingerprint:
            files[int(match[1]), int(match[3] or 0)].append(name)
    return dict(files)


def usable_lines(
    store: Store, names: Iterable[str], has_changed: Callable[[Mapping[str, Any]], bool]
) -> Iterator[Line]:
    """The lines of unfinished files that are results of recordings that have not changed since."""
    for line in (line for name in names for line in intact_lines(store, name)):
        if not line.failed and not has_changed(line.fields):
            yield line


def remove_committed(
    store: Store, files: Mapping[tuple[int, int], list[str]], retries: Mapping[int, int], parts: Container[int]
) -> None:
    """Deletes the `unfinished_files` of tasks that are committed, by their own worker or by one that was faster.

    Args:
      retries: the `committed_parts`.
      parts: those whose files are deleted.
    """
    committed = (names for (part, retry), names in files.items() if part in parts and retry <= retries.get(part, -1))
    store.remove(*itertools.chain.from_iterable(committed))


class Committer:
    """Commits the tasks of a worker when their last line is there, and saves lines meanwhile, in threads of its own.

    Fields:
      tasks_of_others: number of tasks that another worker committed first.
      kept: number of lines that former workers have left.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        files: Mapping[tuple[int, int], list[str]],
        has_changed: Callable[[Mapping[str, Any]], bool],
        previous: Mapping[int, bytes],
    ):
        """
        Args:
          files: the `unfinished_files` of former workers.
          has_changed: says of a line's fields whether its recording has changed since.
          previous: lines that retries may replace, by index.
        """
        self.tasks_of_others = self.kept = 0
        self._store, self._fingerprint = store, fingerprint
        self._files, self._has_changed, self._previous = files, has_changed, previous
        self._started: list[StartedTask] = []
        self._threads = ThreadPoolExecutor(_THREADS)
        self._commits: collections.deque[Future[bool]] = collections.deque()

    def start(self, task: Task) -> StartedTask | None:
        """Starts a task with the lines that former workers have left; None if another worker has committed it."""
        names = self._files.get((task.part, task.retry), ())
        if self._store.exists(part_name(task.part, self._fingerprint, task.retry)):
            self.tasks_of_others += 1
            self._store.remove(*names)
            return None
        started, indices = StartedTask(task), set(task.indices)
        for line in usable_lines(self._store, names, self._has_changed):
            if line.fields["index"] in indices:
                started.lines[line.fields["index"]] = line.data
        started.kept = len(started.lines)
        self.kept += started.kept
        self._started.append(started)
        self._commit_if_done(started)
        return started

    def add(self, started: StartedTask, index: int, line: bytes, *, failed: bool) -> None:
        """Adds the line of an entry. Raises what writing has raised meanwhile."""
        started.lines[index] = line
        if not failed:
            started.waiting_since = started.waiting_since if started.unsaved else time.monotonic()
            started.unsaved.append(line)
        self._commit_if_done(started)
        while self._commits and self._commits[0].done():
            self.tasks_of_others += not self._commits[0].result()  # stays for `close` if it raises
            self._commits.popleft()

    def save(self, seconds: float) -> None:
        """Saves the lines of tasks in which one has waited for so long."""
        for started in self._started:
            if started.unsaved and time.monotonic() - started.waiting_since >= seconds:
                data = b"".join(started.unsaved)
                started.files.append(self._threads.submit(self._save, started.task, data))
                started.unsaved = []

    def close(self) -> None:
        """Waits until all is written. Raises what that has raised."""
        self._threads.shutdown()
        for file in (file for started in self._started for file in started.files):
            file.result()
        while self._commits:
            self.tasks_of_others += not self._commits.popleft().result()

    def _commit_if_done(self, started: StartedTask) -> None:
        if started.is_done:
            self._commits.append(self._threads.submit(self._commit, started))
            self._started.remove(started)

    def _commit(self, started: StartedTask) -> bool:
        """Whether this worker, and not another one, has committed the task, or nothing has changed by a retry."""
        task, lines = started.task, started.lines
        saved = [file.result() for file in started.files]  # by threads that began before this one
        is_first = True
        if not task.retry or any(lines[index] != self._previous[index] for index in task.indices):
            data = b"".join(lines[index] for index in task.indices)
            is_first = self._store.create(part_name(task.part, self._fingerprint, task.retry), data)
        self._store.remove(*self._files.get((task.part, task.retry), ()), *saved)
        return is_first

    def _save(self, task: Task, data: bytes) -> str:
        name = f"unfinished-{task_name(task.part, self._fingerprint, task.retry)}-{uuid.uuid4().hex[:8]}.jsonl"
        self._store.create(name, data)
        return name
