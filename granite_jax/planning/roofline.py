"""What data sheets of TPU chips allow at most: a roofline of encoding, prefill and decoding.

A program cannot be faster than its arithmetic at the chip's peak, nor than its bytes at the bandwidth of the memory
(Williams et al. 2009, the roofline model). Nothing here is measured, and real programs stay below.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from granite_jax.errors import GraniteError
from granite_jax.models.layers.features import num_frames
from granite_jax.models.registry import family_of, model_of
from granite_jax.models.work import Work, Workload
from granite_jax.options import RecognizerName
from granite_jax.waveform import SAMPLING_RATE


@dataclasses.dataclass(frozen=True)
class Chip:
    """A data sheet's figures of one chip.

    Fields:
      name: as topologies begin.
      flops: bfloat16 operations a second at most.
      bandwidth: bytes a second between memory and chip at most.
      memory_bytes: bytes of its memory, of which programs have a little less.
      source: where the figures are published.
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    source: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.flops / 1e12:.0f} TFLOP/s in bfloat16, {self.bandwidth / 1e9:.0f} GB/s, "
            f"{self.memory_bytes / 1e9:.0f} GB ({self.source})"
        )


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # Some editions of this page have 800 GiB/s, which is 5 % more; the scaling book has 8.1e11 as well.
        Chip("v5e", 197e12, 819e9, 16e9, "docs.cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 459e12, 2765e9, 95e9, "docs.cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 918e12, 1638e9, 32e9, "docs.cloud.google.com/tpu/docs/v6e"),
    )
}
"""Chips by the name that topologies begin with. Cross-checked with jax-ml.github.io/scaling-book/tpus."""


def find_chip(topology: str) -> Chip:
    """The data sheet of a topology's chips. Raises GraniteError if there is none here."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise GraniteError(f"no roofline for {name!r:.60}: the data sheets here are those of {', '.join(CHIPS)}")
    return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least that a program takes.

    Fields:
      program: "encode" (with the projector, unless the recognizer is "ctc"), "prefill" or "decode" (all steps), as in
        `aot.Plan`.
      flops, bytes: arithmetic and memory traffic of a batch, of all chips that share a copy of the weights.
      intensity: FLOPs a byte.
      roofline_seconds: the least time of a batch.
      bound_by: which of the two takes longer.
    """

    program: str
    flops: float
    bytes: float
    intensity: float
    roofline_seconds: float
    bound_by: Literal["compute", "memory"]

    def __str__(self) -> str:
        return (
            f"{self.program} roofline: {self.flops / 1e12:.2f} TFLOP, {self.bytes / 1e9:.2f} GB, "
            f"{self.intensity:.0f} FLOP a byte, at least {1000 * self.roofline_seconds:.1f} ms ({self.bound_by})"
        )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of a recognizer's programs for one batch, and what they mean for the rate and the price.

    Fields:
      chip: the data sheet.
      workload: the batch.
      dtype_bytes: bytes of a weight.
      model_parallel: chips that share a copy of the weights.
      audio_tokens_per_second: positions of the language model for each second of audio.
      bounds: of encode, and prefill and decode where there is a language model.
      flops_by_recognizer: of a batch, beside each other.
    """

    chip: Chip
    workload: Workload
    dtype_bytes: int
    model_parallel: int
    audio_tokens_per_second: float
    bounds: tuple[Bound, ...]
    flops_by_recognizer: Mapping[str, float]

    @property
    def rtfx(self) -> float:
        """Seconds of audio that one chip transcribes in a second at most."""
        seconds = sum(bound.roofline_seconds for bound in self.bounds) * self.model_parallel
        return self.workload.batch * self.workload.seconds / seconds

    def dollars(self, price: float) -> float:
        """The least that 1,000 hours of audio cost, for a price of a chip in dollars an hour."""
        return 1000 * price / self.rtfx

    def lines(self, price: float | None = None) -> Iterator[str]:
        """Readable lines: the bounds, what they mean, and everything that was assumed."""
        load = self.workload
        yield str(self.chip)
        yield from map(str, self.bounds)
        cost = (
            ""
            if price is None
            else f", at least ${self.dollars(price):.2f} for 1,000 hours at ${price:.2f} a chip-hour"
        )
        yield f"RTFx of a chip: at most {self.rtfx:,.0f}{cost}"
        flops = (f"{name} {each / 1e12:.2f} TFLOP" for name, each in self.flops_by_recognizer.items())
        yield f"arithmetic of a batch, by recognizer: {', '.join(flops)}"
        yield f"assumed: {load.batch} rows of {load.seconds:g} s without padding"
        if len(self.bounds) > 1:
            yield (
                f"assumed: {self.audio_tokens_per_second:g} audio tokens and {load.tokens_per_second:g} new tokens a "
                f"second, {load.prompt_tokens} prompt tokens besides, new tokens of a row in each decode step: "
                f"{load.tokens_per_step:g}"
            )
        yield "a bound from data sheets: nothing was measured, and real programs are slower"
        if self.dtype_bytes > 2:
            yield "the peak is that of bfloat16: float32 products take several passes, which are not counted"

    def summary(self, price: float | None = None) -> dict[str, Any]:
        """What `lines` says besides the programs, in values that JSON can hold."""
        return {
            "program": "all",
            "measured": False,
            "chip": dataclasses.asdict(self.chip),
            "workload": dataclasses.asdict(self.workload),
            "dtype_bytes": self.dtype_bytes,
            "model_parallel": self.model_parallel,
            "audio_tokens_per_second": self.audio_tokens_per_second,
            "flops_by_recognizer": dict(self.flops_by_recognizer),
            "rtfx_per_chip": self.rtfx,
            "chip_hour_dollars": price,
            "dollars_per_1000_hours": None if price is None else self.dollars(price),
        }


def roofline(
    config: Any,
    chip: Chip,
    load: Workload,
    *,
    dtype_bytes: int = 2,
    model_parallel: int = 1,
    recognizer: RecognizerName = "speech-lm",
) -> Roofline:
    """Bounds of a full batch whose rows are computed without any padding.

    Chips that share a copy of the weights share its work evenly; what they send each other is not counted.

    Args:
      dtype_bytes: bytes of a weight and of a cached number.
      model_parallel: chips that share a copy of the weights.
      recognizer: "ctc" for the encoder alone.

    Raises:
      GraniteError: the recognizer cannot run the model, or the model's family does not count its work.
    """
    model_of(config, recognizer)  # raises if it cannot run the model
    count = family_of(config.model_type).count_work
    if count is None:
        raise GraniteError(f"no roofline for {config.model_type!r}: its family does not count its work")
    works = count(config, load, dtype_bytes)
    flops = {name: sum(each.flops for each in programs.values()) for name, programs in works.items()}
    bounds = tuple(_bound(program, each, chip, model_parallel) for program, each in works[recognizer].items())
    minute = num_frames(60 * SAMPLING_RATE)
    audio_tokens = config.num_audio_tokens(minute) / 60 if "speech-lm" in works else 0.0
    return Roofline(chip, load, dtype_bytes, model_parallel, audio_tokens, bounds, flops)


def _bound(program: str, needed: Work, chip: Chip, chips: int) -> Bound:
    compute, memory = needed.flops / (chip.flops * chips), needed.bytes / (chip.bandwidth * chips)
    by = "compute" if compute >= memory else "memory"
    return Bound(program, needed.flops, needed.bytes, needed.intensity, max(compute, memory), by)
