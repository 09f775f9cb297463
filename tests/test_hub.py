"""Checkpoints by hub id, downloaded by the real client from a stand-in hub on this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_fixture
import hub_server
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from granite_jax import cli
from granite_jax.checkpoint import hub
from granite_jax.checkpoint.directory import COMPANIONS
from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError
from granite_jax.pretrained import load, open_checkpoint

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
    for name in ("decoder_only.safetensors", "train.py", "pytorch_model.bin"):
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
    assert opened.directory == tmp_path / "cache" / "granite_jax" / "checkpoints-2" / "someone--granite-tiny" / COMMIT
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


def test_a_download_that_differs_from_what_was_announced_is_named(server: hub_server.Hub, tmp_path: Path) -> None:
    # Given a hub that announces another hash than that of what it sends, when it is converted, then the file is named
    server.etags["model-00001-of-00002.safetensors"] = "0" * 64
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: damaged \(its SHA-256 is not"):
        open_checkpoint(REPO)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: damaged \(its SHA-256 is not"):
        convert(REPO, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_an_interrupted_conversion_is_no_cached_one(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a conversion that fails half-way, when the checkpoint is opened again, then it is converted from the start
    with monkeypatch.context() as patched:
        patched.setattr("granite_jax.checkpoint.orbax.ocp.partial.finalize", lambda path: 1 / 0)
        with pytest.raises(CheckpointError, match=r"params: Orbax cannot write it \(ZeroDivisionError"):
            open_checkpoint(REPO)
    assert open_checkpoint(REPO).kind == "orbax"


def test_another_process_may_be_faster(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a process that converts the same commit meanwhile, when this one fails for it, then it takes the other's
    def slow(source: Path, place: Path) -> None:
        convert(source, place)
        convert(source, place)  # raises: it is there

    monkeypatch.setattr("granite_jax.pretrained.convert", slow)
    assert open_checkpoint(REPO).kind == "orbax"


def test_a_cache_that_cannot_be_written_is_named(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a cache directory below a file, when a hub id is opened, then the error names the place
    monkeypatch.setenv("XDG_CACHE_HOME", str(server.repositories[REPO][1] / "config.json"))
    with pytest.raises(CheckpointError, match=rf"config\.json/.*/{COMMIT}: cannot be written \(Not a directory\)$"):
        open_checkpoint(REPO)


def test_a_failed_download_goes_on_where_it_was(server: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a hub that refuses one of the files, when its repository is opened, then the error says so
    server.refused.add("model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=rf"^{REPO}: .*it cannot be downloaded \(.*403"):
        open_checkpoint(REPO)

    # And what is there of it is never taken for the whole when the hub cannot be reached
    with monkeypatch.context() as patched:
        patched.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(CheckpointError, match="no such file$|holds neither"):
            open_checkpoint(REPO)

    # When it refuses no more, then only what is missing is sent
    server.refused.clear()
    assert open_checkpoint(REPO).kind == "orbax"
    assert len(set(server.downloads)) == len(server.downloads)


def test_the_command_takes_hub_ids(server: hub_server.Hub, tmp_path: Path) -> None:
    # Given a hub id and its commit, when it is converted and compared, then a line reports what was written
    own = tmp_path / "own"
    command = [sys.executable, "-m", "granite_jax.cli", "convert", REPO, own, "--revision", COMMIT, "--verify"]
    caches = {"HF_HUB_CACHE": str(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | caches)
    assert (done.returncode, done.stderr) == (0, "")  # no bar of the client's in a pipe either
    parts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in open_checkpoint(own).read().items()}
    sizes = ", ".join(f"{part} {count:,}" for part, count in sorted(parts.items()))
    files = sum(file.stat().st_size for file in own.rglob("*") if file.is_file())
    line = rf"{own}: (\d+) tensors, {sizes} parameters, float32, {files:,} bytes, \d+\.\d s, verified\n"
    found = re.fullmatch(line, done.stdout)
    assert found is not None, done.stdout
    source = server.repositories[REPO][1]
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert int(found[1]) == sum(not name.endswith("num_batches_tracked") for name in index)

    # And inspecting it converts it, once, and tells of that
    result = CliRunner().invoke(cli.app, ["inspect", REPO, "--revision", COMMIT, "--verify", "--format", "json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["kind"], told["verified"], told["parameters"]["total"]) == ("orbax", True, sum(parts.values()))
    assert told["directory"] == str(
        tmp_path / "cache" / "granite_jax" / "checkpoints-2" / "someone--granite-tiny" / COMMIT
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [(["inspect", REPO], 1), (["convert", REPO, "out"], 1), (["transcribe", "a.wav", "--checkpoint", REPO], 2)],
)
def test_a_revision_that_the_hub_does_not_have_is_one_line(
    server: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], status: int
) -> None:
    # Given a command with a hub id, when its revision does not exist, then one line names both, and nothing is written
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(cli.app, [*command, "--revision", "v9"])
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith(f"granite-jax: {REPO}: no such directory, and as a hub id (revision v9) it cannot")
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


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
