"""Files and directories are written completely or not at all."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from granite_jax.files import atomic


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("write", [atomic.replace, atomic.create])
@pytest.mark.parametrize("sync", [False, True])
def test_content_is_text_bytes_or_a_file(tmp_path: Path, write: Any, sync: bool) -> None:
    # Given content of each kind, when it is written, then it is there, and nothing else
    (tmp_path / "source").write_bytes(b"\0\xff")
    for name, content in (("text", "é\r\n\udcff"), ("bytes", b"\0\xff"), ("copy", tmp_path / "source")):
        write(tmp_path / name, content, sync=sync)
    binary = dict.fromkeys(("bytes", "copy", "source"), b"\0\xff")
    assert files(tmp_path) == {"text": b"\xc3\xa9\r\n\\udcff", **binary}


def test_a_file_is_created_once_and_replaced_as_often_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    # Given a file, when it is created again, then it stays; when it is replaced, then it has the new content
    assert atomic.create(path, b"first")
    assert not atomic.create(path, b"second")
    assert files(tmp_path) == {"a": b"first"}
    atomic.replace(path, b"third")
    assert files(tmp_path) == {"a": b"third"}


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    # Given a file, when writing to it fails midway, or its source cannot be read, then it is as it was
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), atomic.writing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    for write in (atomic.replace, atomic.create):
        with pytest.raises(FileNotFoundError):
            write(path, tmp_path / "missing")
    assert files(tmp_path) == {"a": b"before"}


def test_synchronized_content_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a record of what is flushed to disk: the size of files, and None for the directory
    flushed: list[int | None] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        is_directory = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        flushed.append(None if is_directory else os.fstat(descriptor).st_size)
        assert is_directory == (tmp_path / name).exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    # When files are written with and without `sync`, then only with it content is flushed, and then the directory
    for name, write in (("a", atomic.replace), ("b", atomic.create)):
        write(tmp_path / f"{name}.fast", b"12345")
        write(tmp_path / name, b"12345", sync=True)
    assert flushed == [5, None] * 2


def test_what_killed_writers_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    # Given temporary files of two ages, and other files that are old
    hours_ago = time.time() - 7200
    for name in (".old.partial", ".new.partial", ".hidden", "a.partial"):
        (tmp_path / name).touch()
        if "new" not in name:
            os.utime(tmp_path / name, (hours_ago, hours_ago))
    # Then only the old temporary one is removed
    atomic.remove_abandoned(tmp_path)
    assert set(files(tmp_path)) == {".new.partial", ".hidden", "a.partial"}


def test_a_temporary_file_is_one_that_is_removed_if_abandoned(tmp_path: Path) -> None:
    # Given a file that is being written, whose writer is killed an hour ago, then what it left is removed
    with atomic.writing(tmp_path / "a"):
        (partial,) = tmp_path.iterdir()
        os.utime(partial, (0, 0))
        atomic.remove_abandoned(tmp_path)
        assert not partial.exists()
        partial.touch()
