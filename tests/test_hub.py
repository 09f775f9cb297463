"""Checkpoints by hub id, downloaded by the real client from a stand-in hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import hf_fixture
import hub_server
import numpy as np
import pytest
from huggingface_hub import constants

from granite_jax import hub
from granite_jax._tree import flatten
from granite_jax.checkpoint import COMPANIONS, load, open_checkpoint
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError

TINY = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4, "max_pos_emb": 40},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2},
}
COMMIT, REPO = "0123456789abcdef0123456789abcdef01234567", "someone/granite-tiny"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub with one small repository, and empty caches."""
    files = tmp_path / "repository"
    hf_fixture.write_random_checkpoint(files, shards=2, **TINY)
    for name in ("out_llm.safetensors", "train.py", "pytorch_model.bin"):
        (files / name).write_bytes(b"not wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        server.repositories[REPO] = (COMMIT, files)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_hub_id_is_downloaded_converted_once_and_cached(server: hub_server.Hub, tmp_path: Path) -> None:
    # Given a repository with more files than are needed, when it is opened by its id
    opened = open_checkpoint(REPO)

    # Then it is converted, in the user's cache, from the files that are needed, and its weights are the repository's
    assert opened.kind == "orbax"
    assert opened.directory == tmp_path / "cache" / "granite_jax" / "checkpoints" / "someone--granite-tiny" / COMMIT
    assert sorted(server.downloads) == sorted(
        [
            "chat_template.jinja",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors.index.json",
        ]
        + [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    )
    expected = flatten(open_checkpoint(server.repositories[REPO][1]).read())
    assert all(np.array_equal(leaf, expected[path]) for path, leaf in opened.leaves())

    # And nothing is downloaded or converted a second time; by its commit it is opened without asking the hub at all
    files, before = list(server.downloads), len(server.requests)
    changed = (opened.directory / "tensors.json").stat().st_mtime_ns
    assert load(REPO, revision="main")[0] == opened.config
    assert server.downloads == files
    asked = len(server.requests)
    assert open_checkpoint(REPO, revision=COMMIT) == opened
    assert (len(server.requests), asked > before) == (asked, True)
    assert (opened.directory / "tensors.json").stat().st_mtime_ns == changed


def test_without_a_network_the_cache_serves(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a repository that was downloaded before, when the hub cannot be reached
    opened = open_checkpoint(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    # Then it opens still, and another one is an error that names it
    assert open_checkpoint(REPO) == opened
    with pytest.raises(CheckpointError, match=r"^someone/else: no such directory, and .* cannot be downloaded"):
        open_checkpoint("someone/else")


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("someone/else", None, r"^someone/else: no such directory, and as a hub id \(revision main\) it cannot be"),
        (REPO, "v9", rf"^{REPO}: .* \(revision v9\) it cannot be downloaded"),
        ("granite", None, r"^granite: no such directory"),
        ("x" * 200, None, r"^x+: no such directory"),
    ],
)
def test_what_the_hub_does_not_have_is_named(server: hub_server.Hub, repo_id: str, revision, message: str) -> None:
    # Given a hub, when it is asked for what it does not have, then the error names repository and revision, in one line
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(repo_id, revision=revision)
    assert len(str(caught.value).splitlines()) == 1


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    # Given a directory, when a revision of it is asked for, then the error says that it has none
    with pytest.raises(CheckpointError, match="is a directory; revision 'v2' is for hub ids"):
        open_checkpoint(tmp_path, revision="v2")


def test_a_download_that_differs_from_what_was_announced_is_named(server: hub_server.Hub) -> None:
    # Given a hub that announces another hash than that of what it sends, when it is converted, then the file is named
    server.etags["model-00001-of-00002.safetensors"] = "0" * 64
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: damaged \(its SHA-256 is not"):
        open_checkpoint(REPO)


def test_an_interrupted_conversion_is_no_cached_one(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a conversion that fails half-way, when the checkpoint is opened again, then it is converted from the start
    with monkeypatch.context() as patched:
        patched.setattr("granite_jax._orbax.ocp.partial.finalize", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_checkpoint(REPO)
    assert open_checkpoint(REPO).kind == "orbax"


def test_converting_a_hub_id_converts_what_was_downloaded(server: hub_server.Hub, tmp_path: Path) -> None:
    # Given a hub id, when it is converted to a directory, then that is Orbax, and no copy in the cache is made
    assert convert(REPO, tmp_path / "own", revision=COMMIT).kind == "orbax"
    assert not (tmp_path / "cache").exists()


def test_a_repository_in_this_programs_format_needs_no_conversion(server: hub_server.Hub, tmp_path: Path) -> None:
    # Given a converted checkpoint that was uploaded, when it is opened by its id, then it is used as downloaded
    convert(server.repositories[REPO][1], tmp_path / "own")
    server.repositories[REPO] = ("f" * 40, tmp_path / "own")
    opened = open_checkpoint(REPO)
    assert opened.directory.is_relative_to(tmp_path / "hub")
    expected = flatten(open_checkpoint(tmp_path / "own").read())
    assert all(np.array_equal(leaf, expected[path]) for path, leaf in opened.leaves())


def test_only_what_is_needed_is_asked_for() -> None:
    # Given names of files, hostile ones among them, when the needed ones are chosen, then they are these
    config, shards = ["config.json", "tokenizer.json"], ["model.safetensors.index.json", "model-1-of-2.safetensors"]
    torch = ["pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin"]
    others = ["*", "model-[a]-of-b.safetensors", "../config.json", "a/model.safetensors", "x.gguf", "model.bin"]
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert hub.needed(config + shards + torch + others, COMPANIONS) == sorted(config + shards)
    assert hub.needed(config + torch + adapter, COMPANIONS) == sorted(config + torch + adapter)
    own = ["params/state/d/1", "params/x", "tensors.json"]
    assert hub.needed(config + own + shards, COMPANIONS) == sorted(config + own)
    assert hub.needed(["params/../../x", "README.md"], COMPANIONS) == ["README.md"]


def test_the_hub_may_not_name_our_directories(server: hub_server.Hub) -> None:
    # Given a hub whose commit is a way out of the cache, when it is asked, then the error says so
    server.repositories[REPO] = ("../../../evil", server.repositories[REPO][1])
    with pytest.raises(CheckpointError, match="the hub names no commit, but"):
        open_checkpoint(REPO)
