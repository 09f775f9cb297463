"""`granite-jax plan`."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from granite_jax.cli import options
from granite_jax.cli.terminal import fail, line
from granite_jax.errors import GraniteError
from granite_jax.models.work import PROMPT_TOKENS, TOKENS_PER_SECOND, Workload
from granite_jax.options import RecognizerName
from granite_jax.planning.largest_batch import largest_batch as search_largest_batch

if TYPE_CHECKING:
    from granite_jax.planning.aot import Plan
    from granite_jax.planning.roofline import Roofline


def plan(
    topology: Annotated[
        str, typer.Option(help="chips to compile for, as in v5e:2x4, v6e:2x2 or v5p:2x2x1", show_default=False)
    ],
    checkpoint: Annotated[str | None, typer.Option(help="as in transcribe", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="in place of a checkpoint: a published model, as in granite-speech-5.0-2b; default: "
            "granite-4.0-1b-speech",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="rows of a full batch on each copy of the weights")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="length of the longest audio in a full batch")] = 20.0,
    dtype: Annotated[options.DtypeName, typer.Option(help="dtype of the weights")] = "bfloat16",
    model_parallel: options.ModelParallel = 1,
    recognizer: Annotated[
        RecognizerName, typer.Option(help="the language model's programs, or the encoder's alone")
    ] = "speech-lm",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="compile the programs, or print the roofline alone")
    ] = True,
    largest_batch: Annotated[
        bool,
        typer.Option(
            "--largest-batch",
            help="plan for the largest multiple of eight rows that fits; begins with --batch, and compiles the "
            "programs for every number of rows that is tried",
        ),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="dollars for an hour of a chip, for the cost of 1,000 hours", show_default=False),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="roofline: tokens of a prompt besides those of the audio")
    ] = PROMPT_TOKENS,
    tokens_per_second: Annotated[
        float, typer.Option(min=0, help="roofline: tokens written for each second of audio")
    ] = TOKENS_PER_SECOND,
    tokens_per_step: Annotated[
        float, typer.Option(min=1, help="roofline: tokens that a row gains in a decode step, more than 1 with drafts")
    ] = 1.0,
    format: Annotated[options.Format, typer.Option(help="readable lines, or one JSON object a program")] = "txt",
) -> None:
    """Compile a model's programs for TPU chips that need not be present, and print what they need.

    Prints peak memory of a chip, whether it fits, collectives and copies of the KV cache. Nothing is run. Prints a
    roofline, too: the least time that data sheets of the chips allow, which is no measurement. The exit status is 1 if
    a program does not fit, 2 if nothing could be planned. Needs pip install 'granite-jax[plan]', but for --no-compile.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # or XLA prints stack traces of what it cannot read
    import jax
    import jax.numpy as jnp

    from granite_jax.models.registry import release
    from granite_jax.planning import aot, roofline
    from granite_jax.pretrained import open_checkpoint
    from granite_jax.recognition.buckets import make_bucket

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if any, is left alone
    as_json = format == "json"
    try:
        if checkpoint and model:
            raise GraniteError("--checkpoint and --model exclude each other")
        if largest_batch and not compile:
            raise GraniteError("--largest-batch and --no-compile exclude each other")
        config = open_checkpoint(checkpoint).config if checkpoint else release(model or "granite-4.0-1b-speech").config

        def compiled(rows: int) -> "Iterable[Plan]":
            bucket = make_bucket(config, rows, seconds)
            options = {"dtype": dtype, "model_parallel": model_parallel, "recognizer": recognizer}
            return aot.plan(config, topology, bucket, **options)

        programs: Iterable[Plan] = ()
        if largest_batch:
            batch, programs = _largest_batch(compiled, batch, quiet=as_json)
        elif compile:
            programs = compiled(batch)
        load = Workload(batch, seconds, prompt_tokens, tokens_per_second, tokens_per_step)
        chip = roofline.CHIPS.get(topology.split(":")[0]) if compile else roofline.find_chip(topology)
        sizes = {"dtype_bytes": jnp.dtype(dtype).itemsize, "model_parallel": model_parallel}
        bounds = roofline.roofline(config, chip, load, recognizer=recognizer, **sizes) if chip else None
        fits = _print_json(programs, bounds, load, price) if as_json else _print_lines(programs, bounds, price)
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    if not fits:
        raise typer.Exit(1)


def _largest_batch(compiled: "Callable[[int], Iterable[Plan]]", start: int, *, quiet: bool) -> "tuple[int, list[Plan]]":
    """The largest batch that fits, and its programs; says of every batch that is tried whether it fits."""
    fitting: dict[int, list[Plan]] = {}

    def fits(rows: int) -> bool:
        programs: list[Plan] = []
        for program in compiled(rows):
            programs.append(program)
            if not program.fits:
                break
        else:
            fitting[rows] = programs
        if not quiet:
            print(f"{rows} rows {'fit' if rows in fitting else 'do not fit'}", flush=True)
        return rows in fitting

    rows = search_largest_batch(fits, start)
    if not rows:
        fail("not even eight rows fit")
        raise typer.Exit(1)
    if not quiet:
        print(f"the largest batch that fits has {rows} rows on each copy of the weights", flush=True)
    return rows, fitting[rows]


def _print_lines(programs: "Iterable[Plan]", bounds: "Roofline | None", price: float | None) -> bool:
    """Prints readable lines, those of programs as soon as they are compiled; returns whether all programs fit."""
    fits = True
    for program in programs:
        fits &= program.fits
        print(line(str(program)), flush=True)
    for text in bounds.lines(price) if bounds else ["no roofline: there are no data sheet figures of these chips here"]:
        print(line(text))
    return fits


def _print_json(programs: "Iterable[Plan]", bounds: "Roofline | None", load: Workload, price: float | None) -> bool:
    """Prints an object a program, and one of program "all" with the bounds of all; returns whether all programs fit."""
    fits, compiled = True, False
    by_program: dict[str, dict[str, Any]] = {b.program: dataclasses.asdict(b) for b in bounds.bounds} if bounds else {}
    for program in programs:
        fits, compiled = fits and program.fits, True
        both = dataclasses.asdict(program) | {"batch": load.batch} | by_program.get(program.program, {})
        print(json.dumps(both), flush=True)
    if not compiled:
        for bound in by_program.values():
            print(json.dumps({"batch": load.batch} | bound))
    if bounds:
        print(json.dumps(bounds.summary(price)))
    return fits
