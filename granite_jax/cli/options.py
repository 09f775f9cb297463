"""The options of `ModelOptions` and `TranscribeOptions` on the command line, the same for every command.

A command whose parameters include such an object gets an option for each of its fields instead:

    @takes_options
    def transcribe(files: list[Path], model: ModelOptions, options: TranscribeOptions) -> None: ...

`takes_job_options` is the same without those fields that `check_mixed` refuses.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from granite_jax.cli.terminal import fail
from granite_jax.errors import GraniteError
from granite_jax.options import ModelOptions, Parallel, TranscribeOptions

Format = Literal["txt", "json"]
DtypeName = Literal["float32", "bfloat16"]

Checkpoint = Annotated[
    str, typer.Option(help="\"demo\", a directory in this program's or Hugging Face's format, or a hub id")
]
ModelParallel = Annotated[
    int, typer.Option(min=1, help="devices that share a copy of the weights, for models too big for one")
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id", show_default=False)]


def _parse_gate(value: str | float) -> float | Literal[False]:
    if value == "off" or value is False:
        return False
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r:.60} is not a number of nats below 0, or off") from None


def _parse_segment_seconds(value: str | float | None) -> float | Literal["auto"] | None:
    if value in ("auto", "off", None):
        return "auto" if value == "auto" else None
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r:.60} is not a number of seconds, auto or off") from None


# By field; other fields can be set in Python only.
_OPTIONS: dict[str, Any] = {
    "checkpoint": Checkpoint,
    "revision": Revision,
    "dtype": Annotated[
        DtypeName | None, typer.Option(help="default: bfloat16 where the device has it", show_default=False)
    ],
    "batch_size": Annotated[
        int | None,
        typer.Option(min=1, help="rows of a full batch on each device; default by device", show_default=False),
    ],
    "parallel": Annotated[Parallel, typer.Option(help="how batches are spread over this machine's devices")],
    "model_parallel": ModelParallel,
    "task": Annotated[
        Literal["transcribe", "punctuate", "translate", "translate-punctuated"],
        typer.Option(help="raw transcript, transcript with punctuation, or translation without and with it"),
    ],
    "compilation_cache": Annotated[bool, typer.Option(help="keep compiled programs in the user's cache directory")],
    "compile_ahead": Annotated[
        bool, typer.Option(help="begin to compile programs for audio of all lengths while the weights are read")
    ],
    "target_language": Annotated[
        str | None,
        typer.Option("--target-language", "--to", help="of a translation, as in fr or French", show_default=False),
    ],
    "language": Annotated[
        str | None,
        typer.Option(help="of a transcript's speech, for models that take such a hint", show_default=False),
    ],
    "prompt": Annotated[
        str | None,
        typer.Option(help="one of the model's prompts (see inspect), instead of the task's", show_default=False),
    ],
    "allow_custom_prompt": Annotated[
        bool, typer.Option("--allow-custom-prompt", help="send prompts that the model does not know, too")
    ],
    "max_new_tokens": Annotated[
        int | None, typer.Option(min=1, help="default: 200, or 6 a second of audio if that is more", show_default=False)
    ],
    "speculative": Annotated[
        Literal["lossless", "relaxed", "relaxed-accurate", "relaxed-fast", "off"],
        typer.Option(help="use of the encoder's drafts: for the same text sooner, or accepted when plausible"),
    ],
    "draft_from": Annotated[
        Literal["ctc", "bpe"] | None,
        typer.Option(help="the encoder's head that drafts; default: bpe where there is one", show_default=False),
    ],
    "ctc_threshold": Annotated[
        float | None,
        typer.Option(min=0, help="relaxed: largest frame entropy, in nats, of a final draft", show_default=False),
    ],
    "verify_threshold": Annotated[
        float | None, typer.Option(min=0, help="relaxed: smallest likelihood of a draft token", show_default=False)
    ],
    "keywords": (
        Annotated[
            list[str] | None,
            typer.Option("--keyword", help="a name or term that may be spoken; repeat for more", show_default=False),
        ],
        Annotated[
            Path | None,
            typer.Option(
                "--keywords-file", help="keywords, one a line; after a tab, a boost in nats", show_default=False
            ),
        ],
    ),
    "keyword_boost": Annotated[
        float | None, typer.Option(min=0, help="boost of keywords, in nats", show_default=False)
    ],
    "keyword_gate": Annotated[
        Any,
        typer.Option(
            parser=_parse_gate,
            metavar="NATS|off",
            help="nats a character, below 0: keywords that score lower are left out; off: none are",
            show_default=False,
        ),
    ],
    "word_timestamps": Annotated[bool, typer.Option("--words", help="time every word of a transcript")],
    "segment_seconds": Annotated[
        Any,
        typer.Option(
            parser=_parse_segment_seconds,
            metavar="SECONDS|auto|off",
            help="longer audio is cut at pauses; auto: as the model has it, mostly 30; off: one pass",
            show_default="auto",
        ),
    ],
    "guards": Annotated[
        bool, typer.Option("--guards/--no-guards", help="notice and mend text that the audio does not support")
    ],
    "channels": Annotated[
        Literal["mix", "split"], typer.Option(help="transcribe the mean of the channels, or each on its own")
    ],
    "recognizer": Annotated[
        Literal["speech-lm", "ctc"] | None,
        typer.Option(help="the language model, or the encoder's own text, which is much faster", show_default=False),
    ],
    "keywords_in": Annotated[
        Literal["decoder", "prompt", "both"], typer.Option(help="bias decoding, mention them in the prompt, or both")
    ],
}
_KEYWORDS_FILE = "keywords_file"


def takes_options(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """Replaces `ModelOptions` and `TranscribeOptions` parameters by an option a field; invalid values exit with 2.

    Args:
      without: fields that the command cannot take.
    """
    objects: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.annotation in (ModelOptions, TranscribeOptions):
            objects[parameter.name] = parameter.annotation
            parameters += [each for each in _parameters(parameter.annotation) if each.name not in without]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        try:
            option_objects = {name: _make(cls, values) for name, cls in objects.items()}
        except GraniteError as error:
            fail(str(error))
            raise typer.Exit(2) from None
        command(**values, **option_objects)

    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


takes_job_options = functools.partial(takes_options, without=("channels",))


def _parameters(cls: type) -> list[inspect.Parameter]:
    parameters = []
    for field in dataclasses.fields(cls):
        if field.name == "keywords":
            options = zip(("keywords", _KEYWORDS_FILE), _OPTIONS["keywords"], (None, None), strict=True)
        elif field.name in _OPTIONS:
            options = [(field.name, _OPTIONS[field.name], field.default)]
        else:
            continue
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, annotation, default in options
        ]
    return parameters


def _make(cls: type, values: dict[str, Any]) -> Any:
    """Makes a `cls` from its fields, which it removes from `values`."""
    fields = {field.name: values.pop(field.name) for field in dataclasses.fields(cls) if field.name in values}
    if "keywords" in fields:
        from granite_jax.keywords.lists import read_keywords

        path = values.pop(_KEYWORDS_FILE)
        fields["keywords"] = (*(read_keywords(path) if path else ()), *(fields["keywords"] or ()))
    if fields.get("speculative") == "off":
        fields["speculative"] = False
    return cls(**fields)
