"""`granite-jax convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from granite_jax.cli import options
from granite_jax.cli.terminal import ProgressDisplay, fail, line
from granite_jax.errors import BackendError, GraniteError


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="checkpoint directory or hub id", show_default=False)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DST", help="directory to write; must not exist, or be empty", show_default=False),
    ],
    dtype: Annotated[
        options.DtypeName | None, typer.Option(help="default: that of the source", show_default=False)
    ] = None,
    names: Annotated[
        Literal["released", "new", "nested"], typer.Option(help="tensor names of a Hugging Face destination")
    ] = "released",
    revision: options.Revision = None,
    verify: Annotated[bool, typer.Option("--verify", help="read everything back and compare")] = False,
) -> None:
    """Convert a checkpoint: Hugging Face to Orbax, or Orbax back to Hugging Face."""
    from granite_jax import convert as converter

    try:
        with ProgressDisplay(f"converting {source}") as display:
            report = converter.convert(
                source,
                destination,
                dtype=dtype,
                names=names,
                revision=revision,
                verify=verify,
                progress=display.show,
            )
    except (GraniteError, OSError) as error:
        fail(str(error))
        raise typer.Exit(2 if isinstance(error, BackendError) else 1) from None
    parts = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    sizes = f"{report.tensors} tensors, {parts} parameters, {report.dtype}, {report.bytes:,} bytes"
    print(line(f"{destination}: {sizes}, {report.seconds:.1f} s{', verified' if verify else ''}"))
