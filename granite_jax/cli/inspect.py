"""`granite-jax inspect`."""

import json
from typing import Annotated

import typer

from granite_jax.cli import options
from granite_jax.cli.terminal import fail, line
from granite_jax.errors import BackendError, GraniteError


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help='"demo", checkpoint directory or hub id', show_default=False)
    ],
    format: Annotated[options.Format, typer.Option(help="readable lines, or one JSON object")] = "txt",
    revision: options.Revision = None,
    verify: Annotated[bool, typer.Option("--verify", help="read all weights and check their hashes")] = False,
) -> None:
    """Describe a checkpoint: parts, parameters, tasks, languages, limits, configuration."""
    from granite_jax.checkpoint.describe import describe, to_lines
    from granite_jax.pretrained import open_checkpoint
    from granite_jax.recognition.buckets import longest_audio

    try:
        opened = open_checkpoint(checkpoint, revision)
        description = describe(opened, verify=verify)
        limits = description["limits"]
        limits["seconds"] = opened.config.max_seconds
        if "speech-lm" in opened.family.recognizers:
            prompt = opened.chat_template().tokens(opened.tokenizer(), opened.capabilities.prompts.transcribe)
            length = len(prompt.prefix) + len(prompt.suffix)
            limits["seconds"] = longest_audio(opened.config, length)
            limits["seconds_with_one_token"] = longest_audio(opened.config, length, 1)
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2 if isinstance(error, BackendError) else 1) from None
    for text in [json.dumps(description)] if format == "json" else to_lines(description):
        print(line(text))
