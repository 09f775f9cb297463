"""Every example of the README and of docs/ works: snippets and commands run, page by page, on files of the names used.

What cannot run here comes after a comment `<!-- parsed only: WHY -->`, and commands within sentences name no files: of
those the command line is parsed by the command itself, and no more.
"""

import functools
import json
import re
import shlex
import shutil
import textwrap
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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PARSED_ONLY = re.compile(r"<!-- parsed only: .+ -->")
# As small as can be, with room for the new tokens of a short recording.
TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2, "max_position_embeddings": 512},
}


@dataclass(frozen=True)
class Example:
    """A command line or a Python snippet, the page and line that it begins in, and whether it can run here."""

    place: str
    text: str
    runs: bool = True


def commands(page: Path) -> Iterator[Example]:
    """Indented lines that begin with granite-jax, and such commands within sentences."""
    runs = True
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if _PARSED_ONLY.fullmatch(line):
            runs = False
        elif line and not line.startswith("    "):
            runs = True
        place = f"{page.name}:{number}"
        if line.startswith("    granite-jax "):
            yield Example(place, line.strip(), runs)
        for inline in re.findall(r"`(granite-jax [^`]+)`", line):
            yield Example(place, inline, runs=False)


def snippets(page: Path) -> Iterator[Example]:
    """Fenced blocks of Python; a page's are one program."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start()) + 1
        yield Example(f"{page.name}:{line}", "\n" * line + block[1])


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the pages name, a small checkpoint in place of the released one, few clips in
    place of 300, and every checkpoint loaded once."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    samples, rate = soundfile.read(ROOT / "samples" / "one-name.wav")
    for name in ("meeting.flac", "a.wav", "b.mp3"):
        soundfile.write(tmp_path / name, samples, rate)
    write_damaged(tmp_path / "talk.flac")
    (tmp_path / "names.txt").write_text("Kowalczyk\nZurich\t8\n")
    lines = [{"audio": f"samples/{name}.wav", "text": "a reference"} for name in ("request", "numbers", "one-name")]
    (tmp_path / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    hf_fixture.write_random_checkpoint(tmp_path / "granite-speech-4.1-2b", **TINY)
    monkeypatch.setattr(heldout, "CLIPS", few_clips(tmp_path / "clips"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = functools.cache(functools.partial(Transcriber.from_pretrained, compilation_cache=False))
    monkeypatch.setattr(Transcriber, "from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_damaged(file: Path) -> None:
    """The damaged FLAC of docs/recordings.md."""
    soundfile.write(file, *soundfile.read(ROOT / "samples" / "long.wav"))
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    file.write_bytes(data)


def few_clips(directory: Path) -> Path:
    directory.mkdir()
    lines = (heldout.CLIPS / "heldout.jsonl").read_text().splitlines(keepends=True)[:6]
    (directory / "heldout.jsonl").write_text("".join(lines))
    for line in lines:
        shutil.copy(heldout.CLIPS / json.loads(line)["audio"], directory)
    return directory


def test_every_snippet_runs(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given the snippets, when a page's run one after another, as in a notebook, then none fails
    found = {page: list(snippets(page)) for page in PAGES}
    assert sum(map(len, found.values())) >= 5
    for page, examples in found.items():
        names: dict[str, Any] = {}
        for example in examples:
            exec(compile(example.text, page.name, "exec"), names)
    # And the README's prints what the README says
    said = next(snippets(ROOT / "README.md"))
    capsys.readouterr()
    exec(compile(said.text, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed and all(f"\n    {line}\n" in (ROOT / "README.md").read_text() for line in printed)


def test_what_comes_out_is_what_is_shown(reader: Path) -> None:
    # Given the text and the subtitles that docs/recordings.md shows, when they are made, then they are those
    page = (ROOT / "docs" / "recordings.md").read_text(encoding="utf-8")
    for options in ([], ["--words", "--format", "srt"]):
        done = CliRunner().invoke(cli.app, ["transcribe", "samples/one-name.wav", *options])
        assert f"\n\n{textwrap.indent(done.stdout, '    ')}\n" in page
    # And what it says of a damaged file
    done = CliRunner().invoke(cli.app, ["transcribe", "talk.flac", "--format", "json", "--output-dir", "."])
    damage = json.loads(Path("talk.json").read_text())["damage"]
    assert f"\n\n{textwrap.indent(done.stderr, '    ')}\n" in page
    assert f'"flags": ["damaged-input"], "damage": {json.dumps(damage)}\n' in page


def test_every_command_runs(reader: Path) -> None:
    # Given the commands in the pages' order, when they run, then each succeeds and says something
    found = [example for page in PAGES for example in commands(page) if example.runs]
    assert len(found) >= 8
    for example in found:
        done = CliRunner().invoke(cli.app, shlex.split(example.text, comments=True)[1:])
        assert done.exit_code == 0 and done.exception is None, f"{example.place}: {done.stderr or done}"
        assert done.stdout.strip(), f"{example.place}: prints nothing"


def test_every_other_command_is_understood() -> None:
    # Given the commands that cannot run here, when their lines are parsed, then they name what there is
    found = [example for page in PAGES for example in commands(page) if not example.runs]
    assert found
    command: Any = typer.main.get_command(cli.app)
    disarm(command)
    for example in found:
        try:
            command.main(shlex.split(example.text, comments=True)[1:], "granite-jax", standalone_mode=False)
        except Exception as error:
            raise AssertionError(f"{example.place}: {example.text}: {error}") from error
    # And one that names what there is not would be found
    with pytest.raises(Exception, match="No such option"):
        command.main(["transcribe", "a.wav", "--no-such-option"], "granite-jax", standalone_mode=False)


def test_every_link_leads_somewhere() -> None:
    # Given the links of every page to files of the project, then the files are there
    for page in [*PAGES, ROOT / "checkpoints" / "demo" / "README.md", ROOT / "deploy" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def disarm(command: Any) -> None:
    """Leaves a command its options alone."""
    command.callback = lambda **_: None
    for each in getattr(command, "commands", {}).values():
        disarm(each)
