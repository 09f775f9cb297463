"""`granite-jax plan`."""

import dataclasses
import json
import os
from typing import Annotated

import typer

from granite_jax.cli import options
from granite_jax.cli.terminal import fail, line
from granite_jax.errors import GraniteError


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
    format: Annotated[options.Format, typer.Option(help="readable lines, or one JSON object a program")] = "txt",
) -> None:
    """Compile a model's programs for TPU chips that need not be present, and print what they need.

    Prints peak memory of a chip, whether it fits, collectives and copies of the KV cache. Nothing is run. The exit
    status is 1 if a program does not fit, 2 if nothing could be compiled. Needs pip install 'granite-jax[plan]'.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # or XLA prints stack traces of what it cannot read
    import jax

    from granite_jax.inference.buckets import make_bucket
    from granite_jax.planning import aot
    from granite_jax.pretrained import open_checkpoint
    from granite_jax.variants import release

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if any, is left alone
    fits = True
    try:
        if checkpoint and model:
            raise GraniteError("--checkpoint and --model exclude each other")
        config = open_checkpoint(checkpoint).config if checkpoint else release(model or "granite-4.0-1b-speech").config
        bucket = make_bucket(config, batch, seconds)
        for program in aot.plan(config, topology, bucket, dtype=dtype, model_parallel=model_parallel):
            fits &= program.fits
            print(json.dumps(dataclasses.asdict(program)) if format == "json" else line(str(program)), flush=True)
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    if not fits:
        raise typer.Exit(1)
