"""Shards, and the fingerprint that keeps results of different jobs apart."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from granite_jax.batch.store import Store
from granite_jax.checkpoint.directory import Checkpoint
from granite_jax.checkpoint.orbax import TENSORS
from granite_jax.checkpoint.save import CHAT_TEMPLATE, CONFIG, TOKENIZER
from granite_jax.checkpoint.tree import flatten
from granite_jax.errors import GraniteError

JOB = "job.json"
_NUM_SHARDS = "GRANITE_JAX_NUM_SHARDS"
_MAX_JOB = 1 << 20
# Files besides the weights that affect transcripts.
_COMPANIONS = (
    *(CONFIG, TOKENIZER, "tokenizer_config.json", CHAT_TEMPLATE, "chat_template.json"),
    *("processor_config.json", "adapter_config.json"),
)


@dataclass(frozen=True)
class Shard:
    """A worker's share: every `count`-th part, from the `index`-th on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise GraniteError(f"shard {self.index} of {self.count}: the first is 0, the last {self.count - 1}")

    def parts(self, total: int) -> range:
        """Numbers of its parts, out of `total`."""
        return range(self.index, total, self.count)

    def name(self, stem: str, suffix: str) -> str:
        """Name of the shard's own file: `stem` and `suffix` alone if there are no other shards."""
        return f"{stem}{suffix}" if self.count == 1 else f"{stem}-{self.index:05}-of-{self.count:05}{suffix}"


def choose_shard(index: int | None, count: int | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard given, or else that of the environment, or else everything.

    Kubernetes' Indexed Jobs set JOB_COMPLETION_INDEX; the job must set GRANITE_JAX_NUM_SHARDS, too. Slurm's arrays set
    SLURM_ARRAY_TASK_ID, which counts from 0 if GRANITE_JAX_NUM_SHARDS is set. Without that, the elements of the array
    (SLURM_ARRAY_TASK_MIN, _MAX, _STEP and _COUNT) share the whole job, and an array with gaps is refused: it can be
    what is submitted again of a larger one.

    Raises:
      GraniteError: one of the two is missing, not a number or out of range, or the array has gaps.
    """
    if index is None and count is None:
        for variable in ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"):
            if variable not in environment:
                continue
            if variable == "SLURM_ARRAY_TASK_ID" and _NUM_SHARDS not in environment:
                return _slurm_shard(environment)
            index, count = _number(environment, variable), _number(environment, _NUM_SHARDS)
            if index >= count:
                raise GraniteError(f"{variable} is {index}, but shards are 0 to {count - 1}: {_NUM_SHARDS} is {count}")
            return Shard(index, count)
        return Shard()
    if index is None or count is None:
        raise GraniteError("a shard's number and the number of shards belong together")
    return Shard(index, count)


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    """The shard of an element of an array, which has as many shards as elements."""
    index, count = (_number(environment, f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "COUNT"))
    first, step = (_number(environment, f"SLURM_ARRAY_TASK_{key}", 0) for key in ("MIN", "STEP"))
    position, rest = divmod(index - first, step or 1)
    last = first + (count - 1) * (step or 1)
    if rest or not 0 <= position < count or _number(environment, "SLURM_ARRAY_TASK_MAX", last) != last:
        raise GraniteError(
            f"SLURM_ARRAY_TASK_ID is {index} in an array with gaps (SLURM_ARRAY_TASK_MIN {first}, "
            f"SLURM_ARRAY_TASK_COUNT {count}), which does not tell how many shards the job has: set {_NUM_SHARDS} to "
            "that number, of shards from 0 on, or give --shard and --num-shards"
        )
    return Shard(position, count)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        problem = "is not set" if value is None else f"is {value!r:.40}, not a number"
        raise GraniteError(f"the environment asks for a shard, but {name} {problem}")
    return int(value)


def weights_identity(checkpoint: Checkpoint) -> str:
    """A hash of all that affects transcripts: the tensors' hashes or the weight files, files beside them, prompts."""
    digest = hashlib.sha256(repr(checkpoint.capabilities).encode())  # these depend on the directory's name, too
    weights = [TENSORS] if checkpoint.kind == "orbax" else sorted(p.name for p in checkpoint.directory.glob("*.*"))
    for name in (*_COMPANIONS, *(name for name in weights if name.endswith((TENSORS, ".safetensors", ".bin")))):
        path = checkpoint.directory / name
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def claim_output_dir(store: Store, description: Mapping[str, Any]) -> str:
    """Claims a directory for the job described, unless the job has it already; returns the job's fingerprint.

    Raises:
      GraniteError: the directory belongs to another job; the message names what differs.
    """
    text = json.dumps(description, indent=1, sort_keys=True)
    if not store.create(JOB, (text + "\n").encode()):
        existing, requested = flatten(read_job(store)), flatten(json.loads(text))
        changes = list[str]()
        different = [key for key in sorted(existing | requested) if existing.get(key) != requested.get(key)]
        if "manifest.sha256" in different:  # its hashes say nothing to a reader
            grown = existing.get("entries") != requested.get("entries")
            sizes = f"had {existing.get('entries')} entries, has {requested.get('entries')}"
            changes.append(f"manifest {sizes if grown else 'has other contents'}")
            different = [key for key in different if key not in ("manifest.sha256", "entries")]
        changes += [f"{key} was {existing.get(key)!r:.200}, is {requested.get(key)!r:.200}" for key in different]
        if changes:
            raise GraniteError(f"the output directory holds results of another job: {'; '.join(changes)}")
    return fingerprint_of(read_job(store))  # of what is stored: equal numbers can be written in several ways


def has_unbounded_parts(store: Store) -> bool:
    """Whether a directory has a job of a version whose parts had any number of seconds."""
    return store.exists(JOB) and "part_seconds" not in read_job(store)


def fingerprint_of(description: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that identify a job."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def read_job(store: Store) -> dict[str, Any]:
    """The description of the job that a directory belongs to. Raises GraniteError if there is none."""
    try:
        with store.open(JOB) as file:
            job = json.loads(file.read(_MAX_JOB))
    except FileNotFoundError:
        raise GraniteError(f"not the output of a batch job: {JOB} is missing") from None
    except (ValueError, RecursionError) as error:
        raise GraniteError(f"{JOB} cannot be read ({error})") from None
    if not isinstance(job, dict):
        raise GraniteError(f"{JOB} is not an object")
    return job
