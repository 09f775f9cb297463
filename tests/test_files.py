"""What is read stays inside the checkpoint's directory, and takes no more memory than its files account for."""

import os
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from granite_jax.checkpoint import orbax
from granite_jax.checkpoint.tree import unflatten
from granite_jax.errors import CheckpointError
from granite_jax.files import paths


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An empty directory with a file beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "checkpoint" / "params").mkdir(parents=True)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["../secret", "params/x", "/etc/passwd", "..", ".", "", "a\\b", "a\0b", "params/"])
def test_names_with_directories_are_refused(checkpoint: Path, name: str) -> None:
    # Given a name that an index file might hold, when it is looked up, then it is refused before the disk is asked
    with pytest.raises(CheckpointError, match="is not a file of this directory$"):
        paths.find(checkpoint, name)


def test_links_out_of_the_directory_are_refused(checkpoint: Path) -> None:
    # Given links to a file outside, directly, by way of another link, and by an absolute path
    (checkpoint / "up").symlink_to("../secret")
    (checkpoint / "twice").symlink_to("up")
    (checkpoint / "absolute").symlink_to(checkpoint.parent / "secret")
    (checkpoint / "blobs").symlink_to("..")  # no cache of a hub, whatever it is called
    (checkpoint / "inside").symlink_to("file")
    (checkpoint / "file").touch()

    # When they are looked up, then they are refused; a link to a file of the directory is not
    for name in ("up", "twice", "absolute"):
        with pytest.raises(CheckpointError, match=f"{name}: is a link that leads out of the directory$"):
            paths.find(checkpoint, name)
    assert paths.find(checkpoint, "inside") == checkpoint / "inside"


def test_what_is_no_file_is_not_found(checkpoint: Path) -> None:
    # Given a directory, a pipe, a loop of links, a link to nothing, and names too long; when looked up, then not found
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "loop").symlink_to("loop")
    (checkpoint / "nothing").symlink_to("nowhere")
    for name in ("params", "pipe", "loop", "nothing", "x" * 5000):
        assert paths.find(checkpoint, name) is None
        with pytest.raises(CheckpointError, match="no such file$"):
            paths.require(checkpoint, name)


def test_a_name_that_is_no_line_of_text_is_escaped(checkpoint: Path) -> None:
    # Given a name with a line break, as an index may hold, when it is asked for, then the error is one line
    with pytest.raises(CheckpointError, match=r"checkpoint/'a\\rb': no such file$"):
        paths.require(checkpoint, "a\rb")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("file", "../../secret", "params/file: is a link that leads out of the directory"),
        ("directory", "..", "params/directory: is a link that leads out of the directory"),
        ("directory", "/etc", "params/directory: is a link that leads out of the directory"),
        ("deep/file", "../../../secret", "params/deep/file: is a link that leads out of the directory"),
        ("loop", "loop", "params/loop: is no file"),
        ("nothing", "nowhere", "params/nothing: is no file"),
    ],
)
def test_links_below_params_are_checked_at_any_depth(checkpoint: Path, name: str, target: str, message: str) -> None:
    # Given a link somewhere below params/, when the weights are opened, then it is named before Orbax follows it
    (checkpoint / "params" / "deep").mkdir()
    (checkpoint / "params" / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{message}$"):
        orbax.stored_dtypes(checkpoint, {})


def test_links_within_and_pipes_below_params(checkpoint: Path) -> None:
    # Given links to a file and a directory within params/, when they are counted, then each counts as Orbax sees it
    (checkpoint / "params" / "deep").mkdir()
    (checkpoint / "params" / "deep" / "file").write_bytes(b"12345")
    (checkpoint / "params" / "link").symlink_to("deep/file")
    (checkpoint / "params" / "again").symlink_to("deep")
    assert paths.check_links(checkpoint / "params") == 10

    # And a pipe, which would be waited for, is refused
    os.mkfifo(checkpoint / "params" / "pipe")
    with pytest.raises(CheckpointError, match="params/pipe: is no file$"):
        paths.check_links(checkpoint / "params")


def test_links_into_the_hubs_own_blobs_are_followed(tmp_path: Path) -> None:
    # Given the cache of huggingface_hub, with a link into another repository's blobs besides
    one, other = tmp_path / "models--a--one", tmp_path / "models--a--other"
    snapshot = one / "snapshots" / ("0" * 40)
    (snapshot / "params").mkdir(parents=True)
    for repository in (one, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "hash").write_bytes(b"123")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "params" / "x").symlink_to("../../../blobs/hash")
    (snapshot / "tokenizer.json").symlink_to(other / "blobs" / "hash")

    # When they are followed, then those into its own blobs are, at any depth, and no others
    assert paths.find(snapshot, "config.json") == snapshot / "config.json"
    assert paths.check_links(snapshot / "params") == 3
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link that leads out of the directory$"):
        paths.find(snapshot, "tokenizer.json")


def test_files_too_small_for_what_they_declare_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given four megabytes of zeros that compresses to next to nothing
    expected = {"encoder.out.kernel": (1 << 10, 1 << 10), "encoder.out.bias": (6,)}
    ocp.save(tmp_path / "params", unflatten({path: np.zeros(shape, np.float32) for path, shape in expected.items()}))
    size = paths.check_links(tmp_path / "params")
    declared = 4 * ((1 << 20) + 6)
    assert 16 * size < declared

    # When it is opened, then it is refused before anything is allocated, but for a size that does no harm
    assert set(orbax.stored_dtypes(tmp_path, expected)) == set(expected)
    monkeypatch.setattr(orbax, "_FREE_BYTES", 0)
    with pytest.raises(CheckpointError, match=rf"params: declares {declared} bytes of tensors, its files hold {size}$"):
        next(orbax.read(tmp_path, expected, verify=False))
