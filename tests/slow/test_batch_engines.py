"""Batch jobs on existing engines: Ray Data, and Kubernetes' Indexed Jobs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import kubernetes_validate
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from granite_jax import cli
from granite_jax.batch.ray_data import Transcribe
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.formats.schema import transcript_fields
from granite_jax.results import Transcript
from granite_jax.transcriber import Transcriber

SAMPLES = Path(__file__).parents[2] / "samples"
DEPLOY = Path(__file__).parents[2] / "deploy"
README = (DEPLOY / "README.md").read_text()
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice"}
# In a process of its own: Ray leaves threads and warnings in those it is started from.
RAY = """
import json, os, signal, sys
import ray
from granite_jax.batch.ray_data import Transcribe

killed, results, *clips = sys.argv[1:]

class Dying(Transcribe):
    # The first actor that is in its third batch is killed, with the batch computed and not yet handed over.
    calls = 0

    def __call__(self, rows):
        found = super().__call__(rows)
        self.calls += 1
        if self.calls == 3:
            try:
                with open(killed, "x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return found | {"process": [os.getpid()] * len(found["id"])}

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = ray.data.from_items([{"audio": clip} for clip in clips]).repartition(len(clips) // 2)
options = {"dtype": "float32", "root": "/", "num_readers": 2, "batch_size": 2, "word_timestamps": True}
found = rows.map_batches(Dying, fn_constructor_kwargs=options, batch_size=2, concurrency=2).take_all()
columns = ("audio", "text", "tokens", "segments", "error", "process")
with open(results, "w") as file:
    json.dump([[row[column] for column in columns] for row in found], file, default=list)
"""


def test_a_killed_actor_of_ray_changes_no_result(tmp_path: Path) -> None:
    # Given recordings, one of several segments, when they go through two actors, one of which is killed midway
    clips = [str(path) for path in [SAMPLES / "long.wav", *sorted(CLIPS.glob("*.ogg"))[:13]]]
    killed, results = tmp_path / "killed", tmp_path / "results"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    environment["RAY_raylet_start_wait_time_s"] = "120"  # of a busy machine
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())  # or the programs here would be others
    command = [sys.executable, "-c", RAY, str(killed), str(results), *clips]
    # First, so that the actors find the programs in the compilation cache.
    asr = Transcriber.from_pretrained("demo", dtype="float32", batch_size=2)
    expected = asr.transcribe(clips, word_timestamps=True)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *columns, processes = zip(*json.loads(results.read_text()), strict=True)
    # Then another process did the rest of its work, and each recording is there once, as it is transcribed without Ray
    assert set(processes) - {int(killed.read_text())}
    rows = {name: (text, tokens, segments) for name, text, tokens, segments, _ in zip(*columns, strict=True)}
    assert rows == {t.audio: (t.text, list(t.tokens), transcript_fields(t)["segments"]) for t in expected}
    assert len(columns[0]) == len(clips) and set(columns[-1]) == {None}
    assert len(expected[0].segments) > 2


def test_rows_that_fail_have_an_error_alone(tmp_path: Path) -> None:
    # Given rows with ids, one of whose files is missing, when they are transcribed, then it alone fails
    clip = min(CLIPS.glob("*.ogg"))
    found = Transcribe(root=CLIPS, num_readers=1, dtype="float32", batch_size=2)(
        {"audio": [clip.name, "none.wav"], "id": ["x", None], "offset": [0.0, float("nan")]}
    )
    assert set(found) == {"id", *transcript_fields(Transcript(""))}
    assert found["id"] == ["x", "none.wav"]
    assert found["error"] == [None, "none.wav: no such file"]
    assert found["text"][0] and not found["text"][1]
    assert found["stats"][0] and found["stats"][1] is None


@pytest.mark.parametrize("names", ["paths", "ids", "neither"])
def test_rows_can_be_the_bytes_of_files(names: str) -> None:
    # Given the contents of files, the last of which is none, as Ray reads binary files
    clips = sorted(CLIPS.glob("*.ogg"))[:2]
    rows: dict[str, Any] = {"bytes": np.array([*(clip.read_bytes() for clip in clips), b"none\0\0"], object)}
    if names == "paths":
        rows["path"] = ["a.ogg", "b.ogg", "c.ogg"]
    elif names == "ids":
        rows["id"] = ["x", "y", "z"]
    # When they are transcribed, then the texts are those of the files, and the last row alone fails
    transcribe = Transcribe(root=CLIPS, num_readers=2, dtype="float32", batch_size=2)
    found, expected = transcribe(rows), transcribe({"audio": [clip.name for clip in clips]})
    assert found["text"] == [*expected["text"], ""]
    audio = ["a.ogg", "b.ogg", "c.ogg"] if names == "paths" else ["bytes[0]", "bytes[1]", "bytes[2]"]
    assert found["audio"] == audio and found["id"] == rows.get("id", audio)
    assert found["error"][:2] == [None, None] and "is not audio" in found["error"][2]


def apply_patch(manifest: dict[str, Any], patch: dict[str, Any]) -> None:
    """Does what `kubectl patch` does with a patch that has no lists."""
    for key, value in patch.items():
        assert key in manifest, f"the manifest has no {key}"
        if isinstance(value, dict):
            apply_patch(manifest[key], value)
        else:
            manifest[key] = value


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def job(accelerator: str) -> dict[str, Any]:
    """The manifest as it is, or as the README's command patches it for TPU v6e."""
    manifest = yaml.safe_load((DEPLOY / "job.yaml").read_text())
    if accelerator == "v6e":
        (patch,) = re.findall(r"kubectl patch --local -f deploy/job\.yaml .*?--patch '(.+?)'", README, re.DOTALL)
        apply_patch(manifest, json.loads(patch))
    return manifest


def test_jobs_are_valid_for_kubernetes(job: dict[str, Any], accelerator: str) -> None:
    # Given a manifest, then it asks for its accelerator and is valid, strictly; and the checker finds a misspelt field
    selector = job["spec"]["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == ACCELERATORS[accelerator]
    kubernetes_validate.validate(job, "1.34", strict=True)
    job["spec"]["backoffLimitPerIndexes"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.34", strict=True)


def test_jobs_say_how_many_shards_there_are(job: dict[str, Any]) -> None:
    # Given a job, then its workers are told as many shards as there are indices
    (worker,) = job["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert environment["GRANITE_JAX_NUM_SHARDS"] == str(job["spec"]["completions"])
    assert job["spec"]["completionMode"] == "Indexed"


def test_jobs_call_the_command_as_it_is(job: dict[str, Any], tmp_path: Path) -> None:
    # Given a job's arguments, with places of this machine, when they are run, then the command understands them
    (worker,) = job["spec"]["template"]["spec"]["containers"]
    places = {"gs://BUCKET": str(tmp_path), "/checkpoint": str(tmp_path / "none")}
    arguments = worker["args"]
    for place, here in places.items():
        arguments = [argument.replace(place, here) for argument in arguments]
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav"}\n')
    done = CliRunner().invoke(cli.app, arguments)
    # And fails for the checkpoint alone
    assert done.exit_code == 2
    assert done.stderr == f"granite-jax: {tmp_path / 'none'}: no such directory\n"
