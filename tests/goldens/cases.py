"""Checkpoints and sounds that the reference and this program are compared on: all made from seeds, none stored."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import hf_fixture
import numpy as np
import soundfile as sf

RATE = 16_000
SAMPLES = Path(__file__).parents[2] / "samples"
PROMPT = "can you transcribe the speech into a written format?"


@dataclasses.dataclass(frozen=True)
class Case:
    """One random checkpoint.

    Fields:
      seed: of its weights.
      options: of `hf_fixture.write_random_checkpoint`.
      loads: the spelling of tensor names that this program reads; transformers 5.8.1 knows the released one alone.
    """

    seed: int
    options: dict[str, Any]
    loads: str = "released"

    def write(self, directory: Path, names: str = "released") -> Path:
        """Writes the checkpoint, named by `names`, and returns its directory."""
        hf_fixture.write_random_checkpoint(directory, self.seed, names=names, **self.options)
        return directory


CASES = {
    # Context 40, window 15 / 5, odd kernel, GQA 2:1.
    "base": Case(0, {}),
    # Odd number of layers, even kernel, several windows of fewer and more queries, GQA 4:1, tied.
    "odd": Case(
        1,
        {
            "tied": True,
            "window_size": 12,
            "downsample_rate": 4,
            "encoder_config": {"num_layers": 5, "conv_kernel_size": 8, "context_size": 24, "max_pos_emb": 24},
            "projector_config": {"num_hidden_layers": 3},
            # Strong layers: with tied embeddings the last token would merely repeat itself.
            "text_config": {"num_key_value_heads": 1, "head_dim": 12, "residual_multiplier": 1.7},
        },
        "new",
    ),
    # Nothing before the middle block, so no self-conditioning; kernel of two; GQA 1:1; one layer of everything.
    "shallow": Case(
        2,
        {
            "downsample_rate": 3,
            "encoder_config": {"num_layers": 1, "conv_kernel_size": 2, "conv_expansion_factor": 3, "num_heads": 5},
            "projector_config": {"num_hidden_layers": 1, "num_attention_heads": 4},
            "text_config": {"num_hidden_layers": 1, "num_key_value_heads": 4},
        },
    ),
    # Every multiplier, epsilon and the rotary base unlike the released ones, and unlike one.
    "multipliers": Case(
        3,
        {
            "projector_config": {"layer_norm_eps": 1e-3},
            "text_config": {
                "embedding_multiplier": 5.5,
                "attention_multiplier": 0.21,
                "residual_multiplier": 0.6,
                "logits_scaling": 2.5,
                "rms_norm_eps": 1e-3,
                "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            },
        },
    ),
    # The released context, table of positions and proportions; GQA 4:1 with eight heads; new names.
    "released": Case(
        4,
        {
            "encoder_config": {
                **{"context_size": 200, "max_pos_emb": 512, "num_layers": 6, "hidden_dim": 64, "dim_head": 8},
                **{"num_heads": 8, "feedforward_mult": 4},
            },
            "projector_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 16},
            "text_config": {
                **{"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 6},
                **{"attention_multiplier": 0.0078125, "max_position_embeddings": 4096},
            },
        },
        "new",
    ),
    # YaRN, in the form of transformers 4: positions far beyond those of pretraining.
    "yarn": Case(
        6,
        {
            "text_config": {
                **{"rope_parameters": None, "rope_theta": 10000.0, "max_position_embeddings": 2048},
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
            },
        },
        "nested",
    ),
    # YaRN with every optional key, its factor from the positions.
    "yarn-options": Case(
        7,
        {
            "text_config": {
                **{"head_dim": 24, "max_position_embeddings": 1536},
                "rope_parameters": {
                    **{"rope_type": "yarn", "rope_theta": 500.0, "original_max_position_embeddings": 128},
                    **{"factor": None, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
                    **{"mscale": 0.7, "mscale_all_dim": 0.3},
                },
            },
        },
    ),
    # A window is one embedding; a table of positions larger than needed; stored in bfloat16; frequent end of text.
    "bfloat16": Case(
        5,
        {
            "dtype": "bfloat16",
            "window_size": 3,
            "downsample_rate": 3,
            "encoder_config": {"num_layers": 2, "max_pos_emb": 100, "output_dim": 256},
            "text_config": {"num_key_value_heads": 4, "num_attention_heads": 8},
        },
    ),
}


GOLDEN_CASES = ("base", "odd", "multipliers", "yarn")
GOLDEN_SOUNDS = ("noise-0.3s", "chirp-2.5s")
STRIDE = 7  # goldens keep every seventh frame, position or step


ROTARY_PATH = Path(__file__).parent / "rotary.json"
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
# Keys of a `text_config`: granite-speech-5.0-2b's, then every option alone, in both forms.
ROTARY_CASES: list[dict[str, Any]] = [
    {"head_dim": 128, "max_position_embeddings": 16384, "rope_theta": 10000.0, "rope_scaling": _YARN},
    {"head_dim": 128, "max_position_embeddings": 16384, "rope_parameters": _YARN | {"rope_theta": 10000.0}},
    {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1e7},
    {"head_dim": 64, "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"head_dim": 64, "max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 2.5}},
    {"head_dim": 128, "max_position_embeddings": 65536, "rope_parameters": _YARN | {"factor": None}},
    *(
        {"head_dim": 128, "max_position_embeddings": 16384, "rope_parameters": _YARN | options}
        for options in (
            {"factor": 40.0},
            {"factor": 0.5},
            {"original_max_position_embeddings": 1000},
            {"beta_fast": 16, "beta_slow": 2},
            {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
            {"truncate": False},
            {"truncate": True},
            {"attention_factor": 0.9},
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            {"mscale": 2.0},
            {"rope_theta": 123.0},
        )
    ),
    # The ramp is cut off at both ends, and is one point.
    {"head_dim": 8, "max_position_embeddings": 64, "rope_parameters": _YARN | {"original_max_position_embeddings": 9}},
    {"head_dim": 4, "max_position_embeddings": 64, "rope_parameters": _YARN | {"beta_fast": 1e-9, "beta_slow": 1e-12}},
]


def golden_path(case: str) -> Path:
    """Where `goldens.make` puts what the reference computes for a case."""
    return Path(__file__).parent / f"{case}.npz"


def fingerprint(directory: Path) -> str:
    """Tells whether a checkpoint made again from its seed is the same, bit for bit."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@functools.cache
def sounds() -> dict[str, np.ndarray]:
    """float32 waveforms at 16 kHz from 0.3 s to 30 s, of every kind: synthetic, silence, clipped, speech."""
    rng = np.random.default_rng(0)
    long = _read("long.wav")
    found = {
        "noise-0.3s": 0.1 * rng.standard_normal(4_800),
        "noise-1s-quiet": 1e-4 * rng.standard_normal(16_123),
        "chirp-2.5s": _chirp(2.5, 60, 7_600),
        "speech-numbers": _read("numbers.wav"),
        "speech-noisy": _read("noisy.wav"),
        "clipped-4s": np.clip(8 * _chirp(4.0, 3_000, 90) + 0.5 * rng.standard_normal(64_000), -1, 1),
        "silence-then-tone-5s": np.concatenate([np.zeros(40_000), 0.9 * _chirp(2.5, 440, 440)]),
        "speech-10s": long[: 10 * RATE + 77],
        "noise-16s": np.clip(0.3 * rng.standard_normal(16 * RATE - 41), -1, 1),
        "speech-30s": np.concatenate([long, long])[: 30 * RATE],
    }
    return {name: sound.astype(np.float32) for name, sound in found.items()}


def _read(name: str) -> np.ndarray:
    sound, rate = sf.read(SAMPLES / name, dtype="float32")
    if rate != RATE or sound.ndim != 1:
        raise ValueError(f"{name} is not 16 kHz mono")
    return sound


def _chirp(seconds: float, start: float, end: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.9 * np.sin(2 * np.pi * (start + (end - start) / (2 * seconds) * time) * time)
