"""Every example of the README works: Python snippets and commands run, in its order, on files of the names it uses.

What cannot run here comes after a comment `<!-- parsed only: WHY -->`, and commands within sentences name no files: of
those the command line is parsed by the command itself, and no more.
"""

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_fixture
import pytest
import soundfile
import typer
from typer.testing import CliRunner

from granite_jax import Transcriber, cli
from granite_jax.evaluation import heldout

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_PARSED_ONLY = re.compile(r"<!-- parsed only: .+ -->")
# As small as can be, with room for the new tokens of a short recording.
TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2, "max_position_embeddings": 512},
}


@dataclass(frozen=True)
class Example:
    """A command line or a Python snippet, the line of the README that it begins in, and whether it can run here."""

    line: int
    text: str
    runs: bool = True


def commands() -> Iterator[Example]:
    """Indented lines that begin with granite-jax, and such commands within sentences."""
    runs = True
    for number, line in enumerate(README.splitlines(), 1):
        if _PARSED_ONLY.fullmatch(line):
            runs = False
        elif line and not line.startswith("    "):
            runs = True
        if line.startswith("    granite-jax "):
            yield Example(number, line.strip(), runs)
        for inline in re.findall(r"`(granite-jax [^`]+)`", line):
            yield Example(number, inline, runs=False)


def snippets() -> Iterator[Example]:
    """Fenced blocks of Python."""
    for block in re.finditer(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield Example(README.count("\n", 0, block.start()) + 2, block[1])


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the README names, a small checkpoint in place of the released one, few clips in
    place of 300, and every checkpoint loaded once."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    samples, rate = soundfile.read(ROOT / "samples" / "one-name.wav")
    for name in ("meeting.flac", "a.wav", "b.mp3"):
        soundfile.write(tmp_path / name, samples, rate)
    (tmp_path / "names.txt").write_text("Kowalczyk\nZurich\t8\n")
    lines = [{"audio": f"samples/{name}.wav", "text": "a reference"} for name in ("request", "numbers", "one-name")]
    (tmp_path / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    hf_fixture.write_random_checkpoint(tmp_path / "granite-4.0-1b-speech", **TINY)
    monkeypatch.setattr(heldout, "CLIPS", few_clips(tmp_path / "clips"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = functools.cache(functools.partial(Transcriber.from_pretrained, compilation_cache=False))
    monkeypatch.setattr(Transcriber, "from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def few_clips(directory: Path) -> Path:
    directory.mkdir()
    lines = (heldout.CLIPS / "heldout.jsonl").read_text().splitlines(keepends=True)[:6]
    (directory / "heldout.jsonl").write_text("".join(lines))
    for line in lines:
        shutil.copy(heldout.CLIPS / json.loads(line)["audio"], directory)
    return directory


def test_every_snippet_runs(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given the snippets, when they run one after another, as in a notebook, then none fails
    found = list(snippets())
    assert len(found) >= 3
    names: dict[str, Any] = {}
    for snippet in found:
        exec(compile("\n" * (snippet.line - 1) + snippet.text, "README.md", "exec"), names)
    assert "turn on the screen" in capsys.readouterr().out


def test_every_command_runs(reader: Path) -> None:
    # Given the commands in the README's order, when they run, then each succeeds and says something
    found = [example for example in commands() if example.runs]
    assert len(found) >= 8
    for example in found:
        done = CliRunner().invoke(cli.app, shlex.split(example.text, comments=True)[1:])
        assert done.exit_code == 0 and done.exception is None, f"README.md:{example.line}: {done.stderr or done}"
        assert done.stdout.strip(), f"README.md:{example.line}: prints nothing"


def test_every_other_command_is_understood() -> None:
    # Given the commands that cannot run here, when their lines are parsed, then they name what there is
    found = [example for example in commands() if not example.runs]
    assert found
    command: Any = typer.main.get_command(cli.app)
    disarm(command)
    for example in found:
        try:
            command.main(shlex.split(example.text, comments=True)[1:], "granite-jax", standalone_mode=False)
        except Exception as error:
            raise AssertionError(f"README.md:{example.line}: {example.text}: {error}") from error
    # And one that names what there is not would be found
    with pytest.raises(Exception, match="No such option"):
        command.main(["transcribe", "a.wav", "--no-such-option"], "granite-jax", standalone_mode=False)


def disarm(command: Any) -> None:
    """Leaves a command its options alone."""
    command.callback = lambda **_: None
    for each in getattr(command, "commands", {}).values():
        disarm(each)
