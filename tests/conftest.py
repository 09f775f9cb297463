"""Eight emulated CPU devices, a compilation cache between runs, and array types checked at run time."""

import os
from pathlib import Path
from typing import Any

import pytest

# Before anything imports jax: a machine with an accelerator, too, tests on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

DEVICES = 8
# Signatures of arrays are the model's and the decode loop's; host code in between only hands arrays on.
PROGRAMS = ["recognition.encoding", "recognition.speech_lm_programs", "recognition.ctc_programs"]
CHECKED = ["array_types", "models.layers", "models.granite_speech.functions", *PROGRAMS, "decoding"]

_PACKAGE = Path(__file__).parents[1] / "granite_jax"
for _path in (_PACKAGE.joinpath(*module.split(".")) for module in CHECKED):  # or a renamed one would go unchecked
    assert _path.is_dir() or _path.with_suffix(".py").is_file(), _path
install_import_hook([f"granite_jax.{module}" for module in CHECKED], "array_checks.check_signature")


def pytest_configure(config: pytest.Config) -> None:
    """Configures jax before any test module is imported, hence before its backend starts."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Every change of dtype or rank is written down, or it is a mistake.
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # An entry that another run is just writing is compiled again, which is no failure.
        config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")


# Files whose tests share compiled programs, hence a worker; and what takes longest, which therefore begins first.
GROUPS = {"test_keyword_transcriber": "random", "test_speculative_transcriber": "random"}
HEAVY = (
    *("test_batch_engines", "test_compiled", "test_demo", "test_notebooks", "test_batch_chaos"),
    *("test_sharding", "test_model", "test_transcriber", "test_speculation", "random", "test_training"),
)


def group_of(path: str) -> str:
    """What is run by one worker, one after the other."""
    return GROUPS.get(Path(path).stem, Path(path).stem)


class GroupScheduling(LoadScopeScheduling):
    """As `--dist=loadgroup`, whose groups xdist 3.8 loses with pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {group: rank for rank, group in enumerate(HEAVY)}
    items.sort(key=lambda item: ranks.get(group_of(item.location[0]), len(HEAVY)))


# Property-based tests and random loops: the cases of each, by GRANITE_JAX_TESTS. They are the same ones in every run.
for profile, cases in {"fast": 50, "ci": 500, "soak": 10_000}.items():
    hypothesis.settings.register_profile(
        profile,
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},  # which can take minutes
    )
hypothesis.settings.load_profile(os.environ.get("GRANITE_JAX_TESTS", "fast"))


@pytest.fixture(scope="session")
def num_cases() -> int:
    """The cases of a loop over random inputs: as many as hypothesis tries."""
    return hypothesis.settings.default.max_examples


@pytest.fixture(scope="session")
def random_asr(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Transcriber with random weights and one bucket, of four rows up to 3 s: three programs."""
    from hf_fixture import write_random_checkpoint
    from plain_transcriber import PlainTranscriber

    from granite_jax.recognition.buckets import Bucket

    directory = tmp_path_factory.mktemp("random")
    write_random_checkpoint(directory, seed=1)
    buckets = [Bucket(4, 48_000, 140, 170)]
    return PlainTranscriber.from_pretrained(
        directory, dtype="float32", batch_size=4, buckets=buckets, compilation_cache=False
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten short files in two directories, for batch jobs."""
    from batch_jobs import write_corpus

    return write_corpus(tmp_path / "corpus")
