"""The command line: results on stdout, one line each; errors on stderr, one line each; an exit status that tells."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hf_fixture
import jax
import numpy as np
import pytest
import soundfile
import typer
from click.testing import Result
from fsspec.implementations.memory import MemoryFileSystem
from plain_transcriber import PlainTranscriber
from safetensors.numpy import load_file
from typer.testing import CliRunner

from granite_jax import Transcriber, cli
from granite_jax.batch.access import AudioStorage
from granite_jax.cli import terminal
from granite_jax.cli.options import takes_options
from granite_jax.cli.terminal import ProgressDisplay, line
from granite_jax.options import ModelOptions, TranscribeOptions
from granite_jax.recognition.buckets import Bucket
from granite_jax.results import Transcript

TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2, "max_position_embeddings": 128},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "hf"
    hf_fixture.write_random_checkpoint(directory, **TINY)
    return directory


@pytest.fixture(scope="module")
def asr(checkpoint: Path) -> Transcriber:
    return PlainTranscriber.from_pretrained(checkpoint, batch_size=2, buckets=[Bucket(2, 33600, 90, 128)])


@pytest.fixture
def loaded(asr: Transcriber, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Has the command take one Transcriber for every checkpoint; the calls that would have loaded one."""
    calls: list[tuple] = []
    monkeypatch.setattr(
        Transcriber, "from_pretrained", lambda source, **options: calls.append((source, options)) or asr
    )
    return calls


@pytest.fixture
def recordings(tmp_path: Path) -> list[str]:
    """Two files, one of whose names is markup to rich."""
    paths = [str(tmp_path / name) for name in ("a.wav", "[bold]b[red].flac")]
    for seed, path in enumerate(paths):
        soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, 16000 + 8000 * seed), 16000)
    return paths


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def shell(*arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the command as a process, with pipes."""
    command = [sys.executable, "-W", "error", "-m", "granite_jax.cli", *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=200, **options)


def test_text_is_one_line_a_file(asr: Transcriber, loaded: list, recordings: list[str]) -> None:
    # Given two files and a model that hears nothing in them, when they are transcribed, then there is a line for each
    texts = [transcript.text for transcript in asr.transcribe(list(recordings), max_new_tokens=4)]
    result = invoke("transcribe", *recordings, "--max-new-tokens", "4")
    assert result.exit_code == 0
    # And one on stderr, for the model's two parts do not agree
    doubts = [f"granite-jax: {path}: low-agreement: the encoder's own text differs much" for path in recordings]
    assert [text.partition(",")[0] for text in result.stderr.splitlines()] == doubts
    assert result.stdout == "".join(f"{path}: {line(text)}\n" for path, text in zip(recordings, texts, strict=True))

    # And for one file its text alone
    assert invoke("transcribe", recordings[1], "--max-new-tokens", "4").stdout == line(texts[1]) + "\n"


def test_each_result_is_printed_as_soon_as_it_is_there(
    asr: Transcriber, loaded: list, recordings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # Given results that come one by one
    printed: list[str] = []

    def stream(*_: Any, **__: Any) -> Any:
        for text in ("one", "two"):
            yield Transcript("a.wav", text)
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(asr, "stream", stream)
    # When two files are transcribed, then each line is there before the next result is
    with pytest.raises(SystemExit, match="0"):
        cli.app(["transcribe", *recordings])
    assert printed == ["a.wav: one\n", "a.wav: two\n"]


def test_audio_is_called_as_it_was_given(loaded: list, recordings: list[str]) -> None:
    path = f"{Path(recordings[0]).parent}/.//a.wav"
    result = invoke("transcribe", path, "--format", "json", "--max-new-tokens", "1")
    assert json.loads(result.stdout)["audio"] == path


@pytest.mark.parametrize("command", [["transcribe", "a.wav"], ["inspect", "demo"], ["convert", "demo", "out"]])
@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nbackend 'tpu': in use"), AssertionError()])
def test_a_platform_that_cannot_start_is_one_line(
    command: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given JAX on a platform whose plugin fails
    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    # When a command needs it, then there is one line with the reason and what can be done, and nothing was tried
    result = invoke(*command)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "granite-jax: JAX cannot start" in result.stderr and "JAX_PLATFORMS=cpu" in result.stderr
    assert (" ".join(str(error).split()) or "AssertionError") in result.stderr


def test_json_is_one_object_a_line(asr: Transcriber, loaded: list, recordings: list[str]) -> None:
    # Given two files, when JSON is asked for, then every line is an object with what a Transcript has
    result = invoke("transcribe", *recordings, "--format", "json", "--max-new-tokens", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [dataclasses.asdict(t) for t in asr.transcribe(list(recordings), max_new_tokens=4)]
    assert objects == json.loads(json.dumps(expected))
    assert set(objects[0]) >= {"audio", "text", "tokens", "duration", "stats"}
    assert [o["audio"] for o in objects] == recordings


def test_failures_lose_nothing_else(loaded: list, recordings: list[str], tmp_path: Path) -> None:
    # Given a file that is no audio and one that is not there, among others
    (tmp_path / "bad.wav").write_text("no audio")
    files = [recordings[0], str(tmp_path / "bad.wav"), recordings[1], str(tmp_path / "none.wav")]

    # When all are transcribed, then the others come out, each failure is a line on stderr, and the exit status tells
    result = invoke("transcribe", *files, "--format", "json", "--max-new-tokens", "2")
    assert result.exit_code == 1
    assert [json.loads(line)["audio"] for line in result.stdout.splitlines()] == recordings
    errors = result.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"granite-jax: {files[1]}: is not audio")
    assert errors[1] == f"granite-jax: {files[3]}: no such file"


@pytest.mark.parametrize("kind", ["standard input", "pipe", "file URL", "store"])
def test_streams_are_read_as_files_are(
    loaded: list, recordings: list[str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a recording that comes another way than by a path
    data = Path(recordings[0]).read_bytes()
    pipe, given = tmp_path / "pipe", None
    if kind == "standard input":
        argument, given = "-", data
    elif kind == "pipe":
        argument = str(pipe)
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True).start()
    elif kind == "file URL":
        argument = f"file://{recordings[0]}"
    else:
        argument = "s3://bucket/a.wav"
        store = MemoryFileSystem()
        store.pipe_file("/bucket/a.wav", data)
        monkeypatch.setattr(AudioStorage, "filesystem", lambda self, protocol: store)
    options = ["--format", "json", "--max-new-tokens", "4"]
    # When it is transcribed, then its text is that of the file, and its name the argument
    expected = json.loads(invoke("transcribe", recordings[0], *options).stdout)
    result = CliRunner().invoke(cli.app, ["transcribe", argument, *options], input=given)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == expected | {"audio": argument}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("https://localhost/a.wav", "https://localhost/a.wav: host localhost is not on the public Internet"),
        ("https://169.254.169.254/a.wav", "host 169.254.169.254 is not on the public Internet"),
        ("http://example.com/a.wav", "protocol 'http' is not allowed, only file, gs, s3, https"),
        ("zip://a::https://example.com/b.zip", "is a chained URL, which is not allowed"),
        ("s3://bucket/none.wav", "s3://bucket/none.wav: no such file"),
        ("-", "-: is empty"),
    ],
)
def test_streams_that_cannot_be_read_fail_alone(
    loaded: list, recordings: list[str], argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AudioStorage, "filesystem", lambda self, protocol: MemoryFileSystem())
    arguments = ["transcribe", argument, recordings[0], "--max-new-tokens", "1", "--format", "json"]
    result = CliRunner().invoke(cli.app, arguments, input=b"")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    (error,) = result.stderr.splitlines()
    assert message in error


def test_protocols_of_urls_can_be_set(loaded: list, recordings: list[str]) -> None:
    # Given a protocol that is not among those that are allowed, then its URLs are refused; and - is given once
    result = invoke("transcribe", "https://example.com/a.wav", "--allow", "file")
    assert "protocol 'https' is not allowed, only file (--allow sets them)" in result.stderr
    result = invoke("transcribe", "a.wav", "--allow", "ftp")
    assert (result.exit_code, result.stderr) == (
        2,
        "granite-jax: protocol 'ftp' is not supported, only file, gs, s3, https\n",
    )
    result = invoke("transcribe", "-", "-")
    assert (result.exit_code, result.stderr) == (2, "granite-jax: standard input, -, can be given once\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "translate"], "granite-jax: task 'translate' needs target_language"),
        (["--to", "fr"], "granite-jax: target_language 'fr' is for task 'translate' only"),
        (
            ["--prompt", "two\nlines", "--allow-custom-prompt"],
            "granite-jax: prompt 'two\\nlines' has the control character",
        ),
        (["--task", "summarise"], "Invalid value for '--task'"),
        (["--format", "xml"], "Invalid value for '--format'"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_options_are_told_apart_from_bad_files(
    loaded: list, recordings: list[str], arguments: list[str], message: str
) -> None:
    # Given an option that makes no sense, when the command runs, then it says so, prints nothing, and exits with 2
    result = invoke("transcribe", *recordings, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_options_reach_the_model(loaded: list, recordings: list[str]) -> None:
    # Given options for loading, when the command runs, then they are passed on, and "demo" is the default
    invoke("transcribe", recordings[0], "--max-new-tokens", "1")
    invoke("transcribe", recordings[0], "--max-new-tokens", "1", "--checkpoint", "some/dir", "--dtype", "bfloat16")
    invoke("transcribe", recordings[0], "--max-new-tokens", "1", "--checkpoint", "some/id", "--revision", "v2")
    invoke("transcribe", recordings[0], "--max-new-tokens", "1", "--parallel", "pmap", "--model-parallel", "2")
    fields = {field.name: field.default for field in dataclasses.fields(ModelOptions) if field.name != "checkpoint"}
    fields["recognizer"] = None
    assert loaded == [
        ("demo", fields),
        ("some/dir", fields | {"dtype": "bfloat16"}),
        ("some/id", fields | {"revision": "v2"}),
        ("demo", fields | {"parallel": "pmap", "model_parallel": 2}),
    ]


@pytest.mark.parametrize("command", ["transcribe", "batch run", "eval"])
def test_every_option_of_the_api_is_an_option_of_every_command(command: str) -> None:
    # Given the fields of the two objects, when a command's help is asked for, then each is there but for JAX's devices
    fields = [field.name for cls in (ModelOptions, TranscribeOptions) for field in dataclasses.fields(cls)]
    named = {"keywords": "keyword", "word_timestamps": "words"}
    options = [f"--{named.get(name, name).replace('_', '-')}" for name in fields if name != "devices"]
    shown = invoke(*command.split(), "--help").stdout
    missing = [] if command == "transcribe" else ["--channels"]  # results of their own, where each input has one line
    assert [option for option in [*options, "--keywords-file", "--to"] if option not in shown] == missing


def test_values_of_the_command_line_become_those_of_the_api(tmp_path: Path) -> None:
    # Given a command, and keywords in a file and by themselves
    made: list[tuple[ModelOptions, TranscribeOptions]] = []
    (tmp_path / "names.txt").write_text("Zurich\t8\n")
    app = typer.Typer()

    @app.command()
    @takes_options
    def command(model: ModelOptions, options: TranscribeOptions) -> None:
        made.append((model, options))

    # When it is called
    arguments = ["--keyword", "Kowalczyk", "--keywords-file", str(tmp_path / "names.txt"), "--batch-size", "4"]
    for others in (
        ["--speculative", "off", "--keyword-gate", "off"],
        ["--keyword-gate", "-2.5"],
        ["--keyword-gate", "x"],
    ):
        CliRunner().invoke(app, [*arguments, *others])
    # Then it gets both objects, with what Python has for "off"; and is not called with what makes no sense
    keywords = (("Zurich", 8.0), "Kowalczyk")
    assert made == [
        (ModelOptions(batch_size=4), TranscribeOptions(keywords=keywords, speculative=False, keyword_gate=False)),
        (ModelOptions(batch_size=4), TranscribeOptions(keywords=keywords, keyword_gate=-2.5)),
    ]


@pytest.mark.parametrize("name", ["/no/such/checkpoint", "./checkpoint"])
def test_an_unknown_checkpoint_is_one_line(recordings: list[str], name: str) -> None:
    # Given a checkpoint that does not exist, when it is asked for, then one line names it
    result = invoke("transcribe", recordings[0], "--checkpoint", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"granite-jax: {name}: no such directory")
    assert len(result.stderr.splitlines()) == 1


def test_output_is_safe_to_print() -> None:
    # Given text that would steer a terminal or break the line, when it is printed, then it does neither
    assert line("a\x1b[31mb\r\nc\x85d\u2028e\tf") == "a [31mb  c d e f"
    assert line("Zoë, 東京 👩\u200d🚀") == "Zoë, 東京 👩\u200d🚀"


@pytest.mark.slow
def test_a_process_in_a_pipe(checkpoint: Path, recordings: list[str], tmp_path: Path) -> None:
    # Given a real process with pipes, and a file whose name is not text
    odd = os.fsencode(tmp_path) + b"/odd\xff\n.wav"
    Path(os.fsdecode(odd)).write_bytes(Path(recordings[0]).read_bytes())
    arguments = ["--checkpoint", checkpoint, "--max-new-tokens", "3", "--format", "json"]
    cache = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    # When it transcribes, then stdout has objects and nothing else, without warnings or a progress bar on stderr
    done = shell("transcribe", recordings[1], odd, *arguments, env=cache)
    assert (done.returncode, done.stderr) == (0, b"")
    objects = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [os.fsencode(o["audio"]) for o in objects] == [os.fsencode(recordings[1]), odd]
    assert all(len(o["tokens"]) == 3 for o in objects)


def test_devices_that_do_not_go_together_are_one_line(checkpoint: Path, recordings: list[str], tmp_path: Path) -> None:
    # Given the one device that CPUs are by default, when weights are to be split over two, then each command says so
    for command in (["transcribe", recordings[0]], ["batch", Path(recordings[0]).parent, "--out", tmp_path / "out"]):
        result = invoke(*command, "--checkpoint", checkpoint, "--model-parallel", "2")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "granite-jax: model_parallel=2 does not divide 1 devices\n"


def test_planning_without_the_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an environment without libtpu, when a plan is asked for, then a line says what to install
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("plan", "--topology", "v5e:2x4")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("granite-jax: planning needs the TPU compiler: pip install 'granite-jax[plan]'")


@pytest.mark.parametrize("command", [[], ["transcribe"], ["convert"], ["inspect"], ["batch"], ["batch", "run"]])
def test_help(command: list[str]) -> None:
    # Given a command, when its help is asked for, then it says what there is
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    expected = {
        "": "transcribe",
        "transcribe": "--checkpoint",
        "convert": "SRC",
        "inspect": "--verify",
        "batch": "merge",
        "batch run": "--num-shards",
    }[" ".join(command)]
    assert expected in result.stdout


def test_checkpoints_convert_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    # Given a Hugging Face directory, when it is converted to this program's own and back
    there = invoke("convert", checkpoint, tmp_path / "own")
    back = invoke("convert", tmp_path / "own", tmp_path / "hf")

    # Then each is reported in one line, and tensors are the same bit for bit
    for result, destination in ((there, "own"), (back, "hf")):
        assert (result.exit_code, result.stderr) == (0, "")
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{tmp_path / destination}: ")
        assert "parameters, float32" in line
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "hf"))
    counters = {name for name in before if "num_batches_tracked" in name}
    assert set(before) == set(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in set(before) - counters)


def test_a_conversion_that_fails_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    # Given a destination in use, one that cannot be made, and a source that is not there
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for source, destination in (("used", "out"), (checkpoint, "used"), (checkpoint, "used/file/out"), ("none", "out")):
        # When converted, then one line says so, and nothing is written
        result = invoke("convert", tmp_path / source, tmp_path / destination)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("granite-jax: ")
        assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


def test_inspect_tells_what_a_checkpoint_is(checkpoint: Path) -> None:
    # Given a Hugging Face directory, when it is inspected as JSON, then parts, limits and configuration are its own
    result = invoke("inspect", checkpoint, "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    tensors = {name: x for name, x in load_file(checkpoint / "model.safetensors").items() if x.ndim}
    count = sum(x.size for x in tensors.values())
    encoder = sum(x.size for name, x in tensors.items() if name.startswith("encoder."))
    assert (told["directory"], told["kind"], told["dtype"]) == (str(checkpoint), "hf", "float32")
    assert (told["parameters"]["total"], told["parameters"]["encoder"]) == (count, encoder)
    assert told["bytes"]["total"] == 4 * count
    assert (told["adapter"], told["verified"]) == (None, False)
    assert told["limits"]["positions"] == told["config"]["decoder"]["max_position_embeddings"] == 128
    assert told["limits"]["ctc_labels"] == told["config"]["encoder"]["output_dim"]
    assert "transcribe" in told["tasks"]

    # And for people the same in lines, of which the last says what was checked
    lines = invoke("inspect", checkpoint, "--verify").stdout.splitlines()
    assert lines[0] == f"{checkpoint}: hf, float32"
    assert any(line.split() == ["total", f"{count:,}", "parameters", f"{4 * count:,}", "bytes"] for line in lines)
    assert lines[-1] == "  all weights can be read"


def test_inspect_cannot_be_made_to_print_controls(checkpoint: Path, tmp_path: Path) -> None:
    # Given a directory whose name would steer a terminal, when it is inspected, then its line does not
    (tmp_path / "a\x1b[31m\nb").symlink_to(checkpoint)
    result = invoke("inspect", tmp_path / "a\x1b[31m\nb")
    assert result.stdout.startswith(f"{tmp_path}/a [31m b: hf, float32\n")


@pytest.mark.parametrize("option", [[], ["--verify"], ["--format", "json"]])
def test_inspecting_what_is_none_is_one_line(tmp_path: Path, option: list[str]) -> None:
    # Given a directory that is no checkpoint, when it is inspected, then one line says so, and nothing else is printed
    result = invoke("inspect", tmp_path, *option)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"granite-jax: {tmp_path}: no checkpoint, config.json is missing\n"


def test_a_full_disk_is_named(checkpoint: Path, tmp_path: Path) -> None:
    # Given a limit on the size of files, when a checkpoint is converted, then a line says so and no checkpoint is there
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)); "
    code += "from granite_jax import cli; sys.argv[0] = 'granite-jax'; cli.main()"
    command = [sys.executable, "-c", code, "convert", checkpoint, tmp_path / "own"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert (done.returncode, done.stdout) == (1, "")
    # Orbax's threads write there, too, even into the same line.
    assert re.search("granite-jax: .*params: Orbax cannot write it .*File too large", done.stderr)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("output", "unbuffered", "error"),
    [
        ("/dev/full", "", "granite-jax: standard output cannot be written: No space left on device\n"),
        ("/dev/full", "1", "granite-jax: standard output cannot be written: No space left on device\n"),
        ("a closed pipe", "", ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line(output: str, unbuffered: str, error: str) -> None:
    # Given a full disk, or a pipe that nobody reads
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe, open("/dev/full", "wb") as full:
        # When something is printed there, then at most a line says so
        done = subprocess.run(
            [sys.executable, "-m", "granite_jax.cli", "--version"],
            stdout=full if output == "/dev/full" else pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (1, error)


@pytest.mark.parametrize(
    ("closed", "arguments", "status", "error"),
    [
        (">&-", "--version", 1, "granite-jax: standard output cannot be written: Bad file descriptor\n"),
        ("<&-", "transcribe -", 1, "granite-jax: -: cannot be read ([Errno 9] Bad file descriptor)\n"),
        (">&- 2>&-", "--version", 1, ""),
        ("2>&-", "--version", 0, ""),
    ],
)
def test_a_closed_stream_is_one_line(closed: str, arguments: str, status: int, error: str) -> None:
    # Given a standard stream that is closed, when a command needs it, then a line and the exit status say so
    command = f"exec '{sys.executable}' -m granite_jax.cli {arguments} {closed}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, error)


def test_messages_that_cannot_be_written_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a full disk for messages
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", full)
    # When there are some, then nothing is raised, and Python's end has nothing to write there
    terminal.fail("nope.wav: no such file")
    terminal.fail("nope.wav: no such file")
    assert sys.stderr is not full
    sys.stderr.close()
    with contextlib.suppress(OSError):
        full.close()


def test_a_picture(loaded: list, recordings: list[str], tmp_path: Path) -> None:
    # Given a file, when its picture is asked for, then it is there, beside the text
    result = invoke(
        "transcribe", recordings[1], "--max-new-tokens", "4", "--format", "json", "--plot", tmp_path / "out.png"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_the_fonts(loaded: list, recordings: list[str], tmp_path: Path) -> None:
    # Given a name in cuneiform, when the picture is drawn, then one line says what is missing in it
    named = Path(recordings[0]).rename(tmp_path / "\U00012000.wav")
    result = invoke("transcribe", named, "--max-new-tokens", "1", "--format", "json", "--plot", tmp_path / "out.svg")
    assert result.exit_code == 0
    assert result.stderr == f"granite-jax: {tmp_path}/out.svg: characters are missing, no font here has them\n"
    assert (tmp_path / "out.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("files", "plot", "message", "status"),
    [
        (2, "out.png", "--plot draws one file, not 2", 2),
        (1, "out.wav", "out.wav: a picture ends in one of ", 2),
        (1, "none/out.png", "No such file or directory", 1),
    ],
)
def test_pictures_that_cannot_be_drawn(
    loaded: list, recordings: list[str], tmp_path: Path, files: int, plot: str, message: str, status: int
) -> None:
    # Given what makes no picture, when it is asked for, then that is one line, before anything is loaded if possible
    result = invoke(
        "transcribe", *recordings[:files], "--format", "json", "--max-new-tokens", "1", "--plot", tmp_path / plot
    )
    assert result.exit_code == status
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert bool(loaded) == (status == 1)


def test_pictures_need_an_extra(loaded: list, recordings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no matplotlib, when a picture is asked for, then the extra that has it is named
    for module in ("granite_jax.plotting.figures", "granite_jax.plotting"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("granite_jax.plotting", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("transcribe", recordings[0], "--plot", "out.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "granite-jax: pictures need matplotlib: pip install 'granite-jax[plots]'\n"


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a clock that a minute passes on between two steps, and no terminal
    clock = itertools.count(step=40)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    # When progress is shown, then there is a line when more than a minute has passed, with what is left
    with ProgressDisplay("transcribing a\x1b[31m.wav") as display:
        for done in range(1, 5):
            display.show(done, 10, "2 failed")
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "granite-jax: transcribing a [31m.wav: 2 of 10, 2 failed, 0:10:40 left",
        "granite-jax: transcribing a [31m.wav: 4 of 10, 2 failed, 0:05:20 left",
    ]
