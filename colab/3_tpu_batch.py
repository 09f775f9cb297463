# %% [markdown]
# # Batches on all devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/granite_jax/blob/main/colab/3_tpu_batch.ipynb)
#
# Devices and the mesh, rows spread over them, and a job over a folder that goes on where it was interrupted. Meant for
# a TPU runtime; on a CPU two devices are emulated, so that everything here still happens, only not faster.

# %% tags=["install"]
# !git clone --quiet --depth 1 https://github.com/OWNER/granite_jax granite-jax; sh granite-jax/colab/install.sh

# %%
# %matplotlib inline
import dataclasses
import json
import platform
import tempfile
from pathlib import Path

import flax
import jax

jax.config.update("jax_num_cpu_devices", 2)  # before the first use of a device; accelerators are what they are

import granite_jax as gj
from granite_jax import batch, plotting
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket

ROOT = next(path for path in map(Path, ("granite-jax", ".", "..")) if (path / "samples").is_dir())
print(
    "Python", platform.python_version(), "granite_jax", gj.__version__, "jax", jax.__version__, "flax", flax.__version__
)
print(f"{jax.device_count()} devices:", *jax.devices(), sep="\n  ")

# %% [markdown]
# ## Rows on devices
#
# Each device has its own copy of the weights and its own rows of a batch. It leaves the decode loop when these are
# done, without waiting for the others. `model_parallel=2` would have two devices share a copy, for models too big for one.

# %%
CHECKPOINT = "demo"
ROWS = {"tpu": 64, "gpu": 32}.get(jax.default_backend(), 4)  # of a batch on each device


def make(devices):
    """A Transcriber with the programs for one shape: audio up to 8 seconds."""
    config = open_checkpoint(CHECKPOINT).config
    buckets = [make_bucket(config, ROWS, 8.0)]
    asr = gj.Transcriber.from_pretrained(CHECKPOINT, devices=devices, batch_size=ROWS, buckets=buckets)
    asr.warmup()
    return asr


one, every = make(jax.devices()[:1]), make(jax.devices())
print(f"one device: batches of {ROWS}; all {jax.device_count()}: batches of {ROWS * jax.device_count()}")
print(f"{every.compilations} programs were compiled: encode, prefill, decode")

# %% [markdown]
# ## A job over a folder
#
# The files become an immutable manifest, its lines parts, and each part a file that appears as a whole or not at all. Any number of workers may share a job (`shard=`, `num_shards=`), each on its own machine.

# %%
folder = ROOT / "granite_jax" / "evaluation" / "heldout_clips"
LIMIT = 24 if jax.default_backend() == "cpu" else 300
listed = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()][:LIMIT]
work = Path(tempfile.mkdtemp())
manifest = work / "manifest.jsonl"
manifest.write_text("".join(json.dumps({"audio": str((folder / each["audio"]).resolve())}) + "\n" for each in listed))


def job(asr, name, **options):
    """Runs the job into a directory of this name; its summary, and how it went."""
    reports = []
    summary = batch.run(
        manifest,
        work / name,
        transcriber=(asr, CHECKPOINT),
        root=folder.resolve(),
        part_size=max(8, LIMIT // 3),
        progress=lambda progress: reports.append(dataclasses.replace(progress)),
        **options,
    )
    return summary, reports


alone, alone_reports = job(one, "one device")
together, together_reports = job(every, "all devices")
for name, summary in {"one device": alone, "all devices": together}.items():
    print(
        f"{name}: {summary.transcribed} of {summary.entries} utterances, {summary.failed} failed, {summary.parts} parts,"
    )
    print(f"  {summary.audio_seconds:.0f} s of audio in {summary.wall_seconds:.1f} s: RTFx {summary.rtfx}")

# %%
plotting.throughput({"one device": (alone, alone_reports), "all devices": (together, together_reports)})

# %% [markdown]
# Results do not depend on the number of devices, nor on batch mates: both jobs wrote the same.

# %%
for name in ("one device", "all devices"):
    print(batch.merge(work / name))
texts = {name: (work / name / "transcripts.jsonl").read_text() for name in ("one device", "all devices")}
print("the same, byte for byte:", texts["one device"] == texts["all devices"])
first = json.loads(texts["all devices"].splitlines()[0])
print(f"said   {listed[0]['text']}\nheard  {first['text']}")

# %% [markdown]
# ## Interrupted, and resumed
#
# A worker that is stopped or preempted keeps what it has finished. The same command again does what is left.

# %%
interrupted, _ = job(every, "interrupted", stop=lambda: any((work / "interrupted").glob("part-*")))
print(f"stopped: {interrupted.stopped}")
resumed, _ = job(every, "interrupted")
print(f"resumed: {resumed.resumed_parts} of {resumed.parts} parts were there, {resumed.transcribed} utterances are now")
batch.merge(work / "interrupted")
print("the same text:", (work / "interrupted" / "transcripts.jsonl").read_text() == texts["all devices"])

# %% [markdown]
# Outside a notebook the job is `granite-jax batch manifest.jsonl --out DIR`; `deploy/` has a manifest for Kubernetes,
# and `granite_jax.batch.ray_data` runs it on Ray.
