"""The notebooks: both halves of each agree, and the .ipynb, executed as Jupyter does, write what they should."""

import base64
import difflib
import json
import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from granite_jax.evaluation.metrics import score

ROOT = Path(__file__).parents[2]
COLAB = ROOT / "colab"
NAMES = sorted(path.stem for path in COLAB.glob("*.ipynb"))
SAMPLES = {
    each["audio"].removesuffix(".wav"): each["text"]
    for each in map(json.loads, (ROOT / "samples" / "samples.jsonl").read_text().splitlines())
}
# A compilation cache that another process is just writing is compiled again, which is no failure.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
warnings.filterwarnings("default", module="ipykernel")
"""


def cells(name: str) -> Any:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


@pytest.fixture
def execute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Runs a notebook in the checkout, without its installation; returns what it printed and drew, and values."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(request.config.cache.mkdir("jax-notebooks")))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    def run(name: str, **expressions: str) -> SimpleNamespace:
        notebook = cells(name)
        notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
        values = ", ".join(f"{key!r}: {expression}" for key, expression in expressions.items())
        notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{values}}}))"))
        NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": COLAB}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        stderr = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
        assert not stderr, stderr
        printed = "".join(o.text for o in outputs if o.output_type == "stream")
        assert re.search(r"^Python 3\.\d+\.\d+ granite_jax \S+ jax \d+\.\d+\S* flax \d", printed, re.MULTILINE)
        drawn = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
        assert all(len(picture) > 5000 for picture in drawn)
        return SimpleNamespace(printed=printed, pictures=len(drawn), **json.loads(printed.splitlines()[-1]))

    return run


# Both halves.


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_agree(name: str) -> None:
    # Given the .py half, when the other is written from it, then it is the one that is there
    notebook = runpy.run_path(str(COLAB / "pairs.py"))["notebook"]
    assert (COLAB / f"{name}.ipynb").read_text() == notebook(COLAB / f"{name}.py"), "run: python colab/pairs.py"


def test_there_are_four() -> None:
    assert [name[0] for name in NAMES] == ["1", "2", "3", "4"]
    assert sorted(path.stem for path in COLAB.glob("[0-9]*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_open_in_colab_and_install_from_the_same_repository(name: str) -> None:
    # Given a notebook, then its badge and the README's lead to itself, and its first code installs that repository
    badge, install = cells(name).cells[:2]
    assert install.cell_type == "code"
    assert len(install.source.splitlines()) == 1
    (repository,) = re.findall(r"github\.com/([\w.-]+/[\w.-]+)", install.source)
    link = f"https://colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb"
    assert f"]({link})" in badge.source
    assert f"]({link})" in (ROOT / "README.md").read_text()


def test_one_command_names_another_repository(tmp_path: Path) -> None:
    # Given a copy of the notebooks, when another repository is named, then no part of the old name is left
    for path in [*COLAB.glob("*.py"), ROOT / "README.md"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    (former,) = re.findall(r"github\.com/([\w.-]+/[\w.-]+)", cells("1_quickstart").cells[1].source)
    command = [sys.executable, str(tmp_path / "colab" / "pairs.py"), "--repository", "someone/a-fork.jax"]
    subprocess.run(command, check=True, timeout=60)
    for path in [*(tmp_path / "colab").glob("[0-9]*"), tmp_path / "README.md"]:
        text = path.read_text()
        assert "someone/a-fork.jax" in text
        assert former not in text


@pytest.mark.parametrize(("device", "extras"), [(None, "plots"), ("nvidia0", "plots,cuda"), ("accel0", "plots,tpu")])
def test_the_installation_is_for_the_machines_accelerator(tmp_path: Path, device: str | None, extras: str) -> None:
    # Given a device, and a Python that only says how it is called
    for name in ("colab", "dev", "bin"):
        (tmp_path / name).mkdir()
    script = (COLAB / "install.sh").read_text()
    assert "/dev/nvidia0" in script and "/dev/accel0" in script
    (tmp_path / "colab" / "install.sh").write_text(script.replace("/dev/", f"{tmp_path}/dev/"))
    (tmp_path / "bin" / "python3").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    if device is not None:
        (tmp_path / "dev" / device).touch()
    # When it installs, then with that device's extra
    done = subprocess.run(
        ["sh", "colab/install.sh"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"-m pip install --quiet colab/..[{extras}]\n"


def test_pictures_of_the_pages_are_there_and_small() -> None:
    # Given the pictures of the documentation, then each is a file of at most 150 kB
    for page in (ROOT / "docs").glob("*.md"):
        for picture in re.findall(r"!\[[^]]*\]\((?!https)([^)]+)\)", page.read_text()):
            assert (page.parent / picture).stat().st_size < 150_000
    assert "overview.png" in (ROOT / "docs" / "research.md").read_text()


# What they write.


def test_quickstart(execute: Callable[..., SimpleNamespace]) -> None:
    run = execute(
        "1_quickstart",
        text="transcript.text",
        all="[each.text for each in transcripts]",
        error="transcripts[-1].error",
        mine="[each.text for each in mine]",
        spoken="spoken.text",
    )
    # Then the sample is heard without a mistake, wherever it stands in for a file or a recording, too
    assert {run.text, *run.mine, run.spoken} == {SAMPLES["two-names"]}
    assert sum(heard == said for heard, said in zip(run.all, SAMPLES.values(), strict=False)) >= 5
    assert "is not audio" in run.error
    assert run.pictures == 1


def test_upload_and_recording_in_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given Colab: a file that is uploaded, and a browser that records two samples at 48 kHz
    pcm = np.array([1, -2], "<i2")
    asked = []
    google, colab = types.ModuleType("google"), types.ModuleType("google.colab")
    found = {"rate": 48000, "pcm": base64.b64encode(pcm.tobytes()).decode()}
    colab.files = SimpleNamespace(upload=lambda: {"a.wav": b"RIFF"})  # pyright: ignore
    colab.output = SimpleNamespace(eval_js=lambda script: asked.append(script) or found)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    # When the notebook's functions are called
    defined: dict[str, Any] = {}
    for cell in cells("1_quickstart").cells:
        if cell.cell_type == "code" and "def " in cell.source:
            exec(cell.source.split("\n\n\nuploaded")[0].split("\n\n\nrecording")[0], defined)
    samples, rate = defined["record"](7)
    # Then they return the file, and the samples with their rate
    assert defined["upload"]() == {"a.wav": b"RIFF"}
    assert (samples.tolist(), samples.dtype, rate) == ([1, -2], np.int16, 48000)
    assert asked[0].endswith("record(7)")


def test_inside_the_model(execute: Callable[..., SimpleNamespace]) -> None:
    run = execute(
        "2_inside_the_model",
        shape="features.shape",
        samples="len(waveform)",
        heard="heard",
        ctc_text="transcript.ctc_text",
        words="[(word.text, word.start, word.end) for word in words]",
        text="transcript.text",
        entropy="float(entropy.max())",
        passes="[each.stats['llm_passes'] for each in (transcript, drafted, greedy)]",
        tokens="[each.tokens for each in (transcript, drafted, greedy)]",
        off="off.text",
        on="on.text",
        keywords="on.stats['keywords']",
        long="long.stats['accepted_tokens'] / long.stats['draft_tokens']",
    )
    # Then pure functions and the Transcriber agree about what is heard, and words follow one another
    assert run.shape == [1, (run.samples // 160 + 1) // 2, 160]
    assert run.heard == run.ctc_text
    assert " ".join(word for word, *_ in run.words) == run.text
    times = [time for _, *interval in run.words for time in interval]
    assert times == sorted(times) and 0 < times[0] < times[-1] <= run.samples / 16_000
    assert 0 < run.entropy < np.log(348)
    # And the better the draft, the fewer passes for the same tokens
    assert run.passes[0] < run.passes[1] < run.passes[2]
    assert run.tokens[0] == run.tokens[1] == run.tokens[2]
    assert 0.5 < run.long < 1
    # And a keyword corrects the name that it spells, and nothing else
    assert run.off == "tokgok called the plan foolish and walked out"
    assert run.on == "tovkog called the plan foolish and walked out"
    assert run.keywords == ["tovkog"]
    assert run.pictures == 7


def test_tpu_batch(execute: Callable[..., SimpleNamespace]) -> None:
    run = execute(
        "3_tpu_batch",
        devices="jax.device_count()",
        compilations="every.compilations",
        entries="[together.entries, together.transcribed, together.failed, together.parts]",
        done="[reports[-1].done for reports in (alone_reports, together_reports)]",
        rtfx="together.rtfx",
        same="len(set(texts.values()))",
        stopped="[interrupted.stopped, resumed.stopped, resumed.resumed_parts, resumed.transcribed]",
        said="[each['text'] for each in listed]",
        heard="[json.loads(line)['text'] for line in texts['all devices'].splitlines()]",
    )
    # Then two devices wrote what one did, all of it, and few words are wrong
    assert (run.devices, run.compilations) == (2, 3)
    assert run.entries == [24, 24, 0, 3]
    assert (run.done, run.same) == ([24, 24], 1)
    assert run.rtfx > 0
    assert score(run.said, run.heard).wer.rate < 40
    # And what was interrupted was resumed to the same
    assert run.stopped[:2] == [True, False]
    assert 1 <= run.stopped[2] < 3
    assert run.stopped[3] == 24
    assert run.printed.count("the same text: True") == 1
    assert run.pictures == 1


def test_research(execute: Callable[..., SimpleNamespace]) -> None:
    run = execute(
        "4_research",
        layers="encoded.layers.shape[0]",
        blocks="config.encoder.num_layers",
        readings="readings",
        share="float(share)",
        part="(inside.stop - inside.start) / len(saliency)",
        losses="losses",
        same="same",
        heard="[[each.ctc_text, each.text] for each in transcripts]",
        files="sorted(path.name for path in (work / 'hf').iterdir())",
        exported="[each.tokens for each in exported] == [each.tokens for each in transcripts]",
        changed="not all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params, tuned)), strict=True))",
    )
    # Then the text appears in the last of the layers, and a word's gradient is where the word is
    assert run.layers == run.blocks
    alike = [difflib.SequenceMatcher(None, reading, SAMPLES["one-name"]).ratio() for reading in run.readings]
    assert alike[0] < alike[-1] > 0.95
    assert run.share > 2 * run.part
    # And the loss falls, the tuned weights are saved and exported as they are, and have learnt
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert run.changed and run.same and run.exported
    assert run.heard == [[SAMPLES[name]] * 2 for name in ("one-name", "two-names", "noisy")]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(run.files)
    assert run.pictures == 2
