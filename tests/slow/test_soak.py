"""What takes too long for every run: `make soak`."""

import json
from pathlib import Path

import pytest

from granite_jax import batch
from granite_jax.evaluation.heldout import CLIPS

pytestmark = pytest.mark.soak


def test_two_hours_of_audio(tmp_path: Path) -> None:
    # Given every held-out clip six times, in other company each time
    clips = sorted(path.name for path in CLIPS.glob("*.ogg"))
    entries = [
        {"id": f"{turn}/{clip}", "audio": clip} for turn in range(6) for clip in clips[50 * turn :] + clips[: 50 * turn]
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))

    # When a batch job transcribes them
    out = tmp_path / "out"
    summary = batch.run(manifest, out, "demo", dtype="float32", root=CLIPS, part_size=100)
    batch.merge(out)

    # Then nothing failed, and a clip's text is the same every time
    assert (summary.transcribed, summary.failed) == (len(entries), 0)
    texts: dict[str, set[str]] = {}
    seconds = 0.0
    for line in map(json.loads, (out / "transcripts.jsonl").read_text().splitlines()):
        texts.setdefault(line["audio"], set()).add(line["text"])
        seconds += line["duration"]
    assert seconds > 7_200
    assert {clip for clip, found in texts.items() if len(found) != 1} == set()
