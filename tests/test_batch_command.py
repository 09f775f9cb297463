"""The command `batch`: what it says, and its exit status."""

from pathlib import Path
from typing import Any

import pytest
from batch_jobs import run, write_lines
from batch_worker import StandIn
from click.testing import Result
from typer.testing import CliRunner

from granite_jax import GraniteError, cli
from granite_jax.batch import job
from granite_jax.cli import failures


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `granite-jax batch` with the stand-in for every checkpoint."""
    asr = StandIn()
    monkeypatch.setattr(job.Transcriber, "from_options", lambda *_, **__: asr)

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(cli.app, ["batch", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.mark.parametrize(
    ("missing", "options", "status"),
    [
        (0, [], 0),
        (1, [], 0),
        (3, [], 0),
        (4, [], 3),  # all
        (1, ["--max-failures", "0"], 3),
        (0, ["--max-failures", "0"], 0),
        (2, ["--max-failures", "2"], 0),
        (3, ["--max-failures", "2"], 3),
        (2, ["--max-failures", "50%"], 0),
        (3, ["--max-failures", "50%"], 3),
        (4, ["--max-failures", "100%"], 0),
        (1, ["--max-failures", "24.9%"], 3),
    ],
)
def test_the_exit_status_tells_too_many_failures(
    corpus: Path, tmp_path: Path, command: Any, missing: int, options: list[str], status: int
) -> None:
    # Given four entries, some of which have no file
    names = [f"a/{i}.wav" for i in (1, 3, 5, 7)][missing:] + ["none.wav"] * missing
    manifest = write_lines(corpus / "m.jsonl", *({"audio": name} for name in names))
    # When they are run, and again, when there is nothing left to do
    for _ in range(2):
        result = command(manifest, "--out", tmp_path / "out", *options)
        # Then the status says if too many failed, and so does a line
        assert result.exit_code == status
        assert (f"{missing} of 4 utterances failed" in result.stderr) == (status == 3)
        assert f"{4 - missing} of 4 utterances, {missing} failed" in result.stdout
        # And lines name the first three that failed, and the file with all of them
        shown = [f"utterance {i}: none.wav: no such file" for i in range(4 - missing, 4)][:3]
        shown += [f"all utterances that failed are in {tmp_path}/out/errors.jsonl"] * (missing > 0)
        assert result.stderr.splitlines()[: len(shown)] == [f"granite-jax: {text}" for text in shown]
        assert result.stderr.count("none.wav") == min(missing, 3)


def test_percentages_are_exact() -> None:
    assert [failures.max_failures(text, 10_000) for text in ("0.57%", "29%", "100%", "0.01%")] == [57, 2900, 10_000, 1]


@pytest.mark.parametrize("value", ["many", "-1", "5 %", "1e9", ""])
def test_what_max_failures_cannot_be_is_said_before_the_work(
    corpus: Path, tmp_path: Path, command: Any, value: str
) -> None:
    result = command(write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}), "--out", tmp_path, "--max-failures", value)
    assert result.exit_code == 2 and "neither a number nor a percentage" in result.stderr


def test_a_shard_of_the_environment_is_told(
    corpus: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker of ten, as Slurm numbers them, and a manifest of one part
    for key, value in {"ID": "3", "MIN": "0", "COUNT": "10"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"})
    # When it runs, then it says why it has nothing to do, and how to run everything
    result = command(manifest, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "makes this worker shard 3 of 10 (--shard 0 --num-shards 1 transcribes everything)" in result.stderr
    assert "shard 3 of 10 has no parts" in result.stderr
    result = command(manifest, "--out", tmp_path / "out", "--shard", "0", "--num-shards", "1")
    assert (result.exit_code, result.stderr) == (0, "") and "1 of 1 utterances" in result.stdout


def test_what_decides_which_audio_is_read_identifies_a_job(corpus: Path, tmp_path: Path) -> None:
    # Given a finished job
    manifest = write_lines(corpus / "m.jsonl", {"audio": "1.wav"})
    run(manifest, tmp_path / "out", root=str(corpus / "a"))
    # When it is run with another root, or other protocols, then it is another job; a root spelled otherwise is the same
    with pytest.raises(GraniteError, match=r"another job: root was '.*/a', is '.*/b'"):
        run(manifest, tmp_path / "out", root=str(corpus / "b"))
    with pytest.raises(GraniteError, match="another job: allow"):
        run(manifest, tmp_path / "out", root=str(corpus / "a"), allow=("file", "https"))
    summary, _ = run(manifest, tmp_path / "out", root=f"{corpus}/./b/../a/", allow=("s3", "gs", "file"))
    assert (summary.resumed_parts, summary.parts) == (1, 1)


def test_errors_name_the_option_that_helps(corpus: Path, tmp_path: Path, command: Any) -> None:
    entries = [{"audio": str(tmp_path / "x.wav")}, {"audio": "https://example.com/a.wav"}]
    command(write_lines(corpus / "a" / "m.jsonl", *entries), "--out", tmp_path / "out")
    errors = (tmp_path / "out" / "errors.jsonl").read_text()
    assert "(--root sets the directory that files must be below)" in errors and "(--allow sets them)" in errors


def test_fields_that_are_not_understood_are_named_once(corpus: Path, tmp_path: Path, command: Any) -> None:
    # Given many lines with a field that looks as if it should change results, when they are run, then it is named once
    lines = [{"audio": f"a/{i % 5 * 2 + 1}.wav", "start": i} for i in range(100)]
    result = command(write_lines(corpus / "m.jsonl", *lines), "--out", tmp_path / "out", "--part-size", "10")
    assert result.stderr == "granite-jax: the manifest has fields that are not understood, and change nothing: start\n"
    assert result.exit_code == 0


def test_changed_recordings_are_told(corpus: Path, tmp_path: Path, command: Any) -> None:
    # Given a finished job, when a recording has changed, then the next run says that it was transcribed anew
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
    command(manifest, "--out", tmp_path / "out")
    (corpus / "a/1.wav").write_bytes((corpus / "a/5.wav").read_bytes())
    assert command(manifest, "--out", tmp_path / "out", "--detect-changes", "off").stderr == ""
    result = command(manifest, "--out", tmp_path / "out")
    assert result.stderr == "granite-jax: utterances transcribed anew because their files have changed: 1\n"
    assert "2 of 2 utterances, 0 failed" in result.stdout
