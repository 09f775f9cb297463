"""`granite-jax eval`: error rates on sets, and the comparison of two runs."""

import functools
import json
from typing import Annotated, Literal

import typer

from granite_jax.cli import failures, signals
from granite_jax.cli.batch import show_job
from granite_jax.cli.failures import MaxFailures
from granite_jax.cli.options import takes_job_options
from granite_jax.cli.terminal import ProgressDisplay, fail
from granite_jax.errors import GraniteError
from granite_jax.options import ModelOptions, TranscribeOptions


@takes_job_options
def evaluate(
    model: ModelOptions,
    options: TranscribeOptions,
    sets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SET",
            help="a manifest with text, tfds:DIRECTORY#SPLIT, tfds:NAME#SPLIT, demo, librispeech-clean, "
            "librispeech-other, tedlium; NAME=SET names its column",
            show_default=False,
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="directory of the run", show_default=False)] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="two finished runs, in place of sets", show_default=False),
    ] = None,
    reference_language: Annotated[
        str | None,
        typer.Option(help="of the references, selects the normalizer; default: --language, or en", show_default=False),
    ] = None,
    normalizer: Annotated[
        Literal["english", "basic", "lowercase"] | None,
        typer.Option(help="default: english for English, basic for others", show_default=False),
    ] = None,
    keyword_lists: Annotated[
        list[str] | None,
        typer.Option(metavar="TSV", help="LibriSpeech biasing lists, for B-WER and U-WER; repeatable"),
    ] = None,
    bias: Annotated[
        bool,
        typer.Option("--bias", help="bias with each utterance's list, from --keyword-lists or the set"),
    ] = False,
    part_size: Annotated[int, typer.Option(min=1, help="at most so many utterances are committed together")] = 128,
    root: Annotated[
        str | None, typer.Option(help="directory that local files must be below; default: the manifest's directory")
    ] = None,
    max_failures: MaxFailures = None,
    format: Annotated[Literal["md", "json"], typer.Option(help="Markdown tables, or one JSON object")] = "md",
) -> None:
    """Transcribe sets and compare with their references; the same command again resumes.

    Prints the tables, and writes them with all numbers to DIR: results.md, results.json, SET/utterances.jsonl. The exit
    status is 0 if all sets are done, even if single utterances failed: they count as if nothing had been heard. It is 3
    if more failed than --max-failures allows; 1 if results could not be written, and 143 after SIGTERM (130 after
    Ctrl-C): run again; 2 if the evaluation cannot be run.
    """
    try:
        from granite_jax import evaluation
    except ModuleNotFoundError as error:
        fail(f"eval needs pip install 'granite-jax[eval]' ({error})")
        raise typer.Exit(2) from None
    failed, utterances = 0, 0
    try:
        failures.max_failures(max_failures, 0)
        if compare is not None:
            if sets:
                raise GraniteError("--compare takes two finished runs and no SET arguments")
            results = evaluation.compare(*compare)
            text = evaluation.comparison_to_markdown(results)
        else:
            if out is None:
                raise GraniteError("--out is missing: the directory of the run")
            with signals.defer_signals() as stop, ProgressDisplay("transcribing") as display:
                results = evaluation.evaluate(
                    sets or [],
                    out,
                    model,
                    options,
                    reference_language=reference_language,
                    normalizer=normalizer,
                    keyword_lists=keyword_lists or (),
                    bias=bias,
                    root=root,
                    part_size=part_size,
                    progress=functools.partial(show_job, display),
                    stop=stop,
                )
            if results is None:
                fail(f"stopped by {stop.name}; run again to resume {out}")
                raise typer.Exit(stop.status)
            text = evaluation.to_markdown(results)
            failed = sum(set_results["failed"] for set_results in results["sets"])
            utterances = sum(set_results["utterances"] for set_results in results["sets"])
            if failed:
                fail(f"{failed} utterances failed, and count as if nothing had been heard: see {out}/*/errors.jsonl")
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    except OSError as error:  # a full disk can be temporary
        fail(f"{out}: {error}; what is committed stays: run again to resume")
        raise typer.Exit(1) from None
    print(json.dumps(results, ensure_ascii=False) if format == "json" else text, end="\n" if format == "json" else "")
    failures.check_failures(failed, utterances, max_failures)
