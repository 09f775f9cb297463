"""The embedded checkpoint, evaluated on the held-out clips."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from batch_jobs import write_lines

from granite_jax import Transcriber, evaluation
from granite_jax.evaluation import heldout
from granite_jax.evaluation.datasets import open_sets
from granite_jax.evaluation.heldout import CLIPS


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 of the held-out clips."""
    directory = tmp_path_factory.mktemp("clips")
    lines = (CLIPS / "heldout.jsonl").read_text().splitlines()[:20]
    write_lines(directory / "heldout.jsonl", *lines)
    for line in lines:
        shutil.copy(CLIPS / json.loads(line)["audio"], directory)
    return directory


def test_the_demos_set_is_read_without_tensorflow(clips: Path, tmp_path: Path) -> None:
    # Given the clips, when they are prepared as a TFDS data set, then it has them in their order
    prepared = heldout.prepare(tmp_path, clips)
    (found,) = open_sets([f"tfds:{prepared}#test"])
    expected = [json.loads(line) for line in (clips / "heldout.jsonl").read_text().splitlines()]
    assert [(u.id, u.text, list(u.keywords or ())) for u in found.utterances] == [
        (clip["id"], clip["text"], clip["names"]) for clip in expected
    ]
    assert [u.seconds for u in found.utterances] == pytest.approx([clip["duration"] for clip in expected], abs=1e-3)
    assert "tensorflow" not in sys.modules
    # And nothing is prepared twice
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert heldout.prepare(tmp_path, clips) == prepared
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_demo_is_evaluated_for_real(clips: Path, tmp_path: Path) -> None:
    # Given the clips as a TFDS data set, when the embedded checkpoint is evaluated on it, then most words are right
    prepared = heldout.prepare(tmp_path, clips)
    asr = Transcriber.from_pretrained("demo", dtype="float32")
    results = evaluation.evaluate([f"Demo=tfds:{prepared}#test"], tmp_path / "out", transcriber=(asr, "demo float32"))
    assert results is not None
    (found,) = results["sets"]
    assert (found["name"], found["scored"], found["failed"]) == ("Demo", 20, 0)
    assert 0.0 <= found["wer"]["low"] <= found["wer"]["rate"] <= found["wer"]["high"] < 50.0
    assert {"cer", "b_wer", "u_wer"} <= set(found)
    # And nothing was compiled while it was timed
    assert results["seconds"]["late_compilations"] == 0
    assert results["seconds"]["compile"] > 0 and results["rtfx"] > 0
