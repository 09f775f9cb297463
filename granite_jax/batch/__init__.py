"""Batch jobs: any number of hours of audio, by any number of workers, each of which may die at any time.

In short:

    from granite_jax import batch

    batch.run("manifest.jsonl", "out/", "demo")       # the same call again resumes
    batch.merge("out/")
"""

from granite_jax.batch.job import Progress, Summary, run
from granite_jax.batch.merge import merge
from granite_jax.batch.parts import Shard, choose_shard

__all__ = ["Progress", "Shard", "Summary", "choose_shard", "merge", "run"]
