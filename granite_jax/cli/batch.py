"""`granite-jax batch`: run one worker of a job, and merge its parts."""

import functools
from typing import Annotated, Any, Literal

import typer
import typer.core

from granite_jax.cli import failures, signals
from granite_jax.cli.failures import MaxFailures
from granite_jax.cli.options import takes_job_options
from granite_jax.cli.terminal import ProgressDisplay, fail, line
from granite_jax.errors import GraniteError
from granite_jax.options import ModelOptions, TranscribeOptions


class _DefaultGroup(typer.core.TyperGroup):
    """`batch MANIFEST` is `batch run MANIFEST`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Transcribe any number of files with any number of workers: granite-jax batch MANIFEST --out DIR.",
)


@app.command()
@takes_job_options
def run(
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST", help="JSON lines, a directory, a glob or tfds:DIRECTORY#SPLIT", show_default=False
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="directory, or gs:// or s3:// URL", show_default=False)],
    model: ModelOptions,
    options: TranscribeOptions,
    shard: Annotated[
        int | None, typer.Option(min=0, help="this worker's number; default: from the environment", show_default=False)
    ] = None,
    num_shards: Annotated[int | None, typer.Option(min=1, help="number of workers", show_default=False)] = None,
    part_size: Annotated[int, typer.Option(min=1, help="most utterances that are committed together")] = 1024,
    part_seconds: Annotated[float, typer.Option(min=1, help="most seconds of audio of these, estimated")] = 3600.0,
    root: Annotated[
        str | None, typer.Option(help="directory that local files must be below; default: the manifest's directory")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="protocols of audio: file, gs, s3 (the default), https; repeatable", show_default=False),
    ] = None,
    readers: Annotated[
        Literal["threads", "processes"], typer.Option(help="processes survive files that kill a decoder")
    ] = "threads",
    num_readers: Annotated[int, typer.Option(min=1, help="threads or processes")] = 16,
    max_failures: MaxFailures = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="try all failed utterances again, not only those out of reach")
    ] = False,
    detect_changes: Annotated[
        Literal["time", "hash", "off"], typer.Option(help="how local files that changed since a former run are noticed")
    ] = "time",
) -> None:
    """Transcribe a manifest, or one shard of it; the same command again resumes.

    It also retries audio that was out of reach, and transcribes anew what has changed since.

    Lines of the manifest are JSON objects with audio (or path, or the like), and optionally offset, duration, id, task,
    target_language (or to), keywords and prompt; options apply to lines without their own. DIR gets part-*.jsonl,
    errors.jsonl, summary.json, job.json, parts.json (where parts begin) and, until their part is done,
    unfinished-*.jsonl. The exit status is 0 if the shard is done, even if single utterances failed, and 3 if more of
    them failed than --max-failures allows; 1 if results could not be written, and 143 after SIGTERM (130 after Ctrl-C),
    which keeps the utterances that are done: run again; 2 if the job cannot be run.
    """
    from granite_jax import batch

    try:
        failures.max_failures(max_failures, 0)
        share = batch.choose_shard(shard, num_shards)
        if share.count > 1 and shard is None:
            fail(
                f"the environment makes this worker shard {share.index} of {share.count} "
                "(--shard 0 --num-shards 1 transcribes everything)"
            )
        with signals.defer_signals() as stop, ProgressDisplay("transcribing") as display:
            summary = batch.run(
                manifest,
                out,
                model,
                options,
                shard=share.index,
                num_shards=share.count,
                part_size=part_size,
                part_seconds=part_seconds,
                root=root,
                allow=tuple(allow or ("file", "gs", "s3")),
                readers=readers,
                num_readers=num_readers,
                retry_failed=retry_failed,
                detect_changes=detect_changes,
                progress=functools.partial(show_job, display),
                stop=stop,
            )
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    except OSError as error:  # a full disk or an unreachable store can be temporary
        fail(f"{out}: {error}; what is committed stays: run again to resume")
        raise typer.Exit(1) from None
    for note in summary.notes:
        display.tell(note)
    if summary.changed:
        fail(f"utterances transcribed anew because their files have changed: {summary.changed}")
    if summary.stopped:
        fail(f"stopped by {stop.name}; run again to resume {out}")
        raise typer.Exit(stop.status)
    if not summary.parts:
        fail(f"shard {summary.shard} of {summary.num_shards} has no parts: there are fewer parts than shards")
    for identity, error in summary.errors:
        fail(f"utterance {identity:.80}: {error:.400}")
    if summary.failed:
        name = batch.Shard(summary.shard, summary.num_shards).name("errors", ".jsonl")
        fail(f"all utterances that failed are in {out.rstrip('/')}/{name}")
    print(line(f"{out}: {summary.transcribed} of {summary.entries} utterances, {summary.failed} failed"))
    failures.check_failures(summary.failed, summary.entries, max_failures)


@app.command()
def merge(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a job's --out", show_default=False)],
) -> None:
    """Join a job's parts into transcripts.jsonl and errors.jsonl, after checking that nothing is missing or double.

    The exit status is 1 if the check fails.
    """
    from granite_jax import batch

    try:
        summary = batch.merge(directory)
    except (GraniteError, OSError) as error:
        fail(str(error))
        raise typer.Exit(1) from None
    print(line(f"{directory}: {summary['transcribed']} of {summary['entries']} utterances, {summary['failed']} failed"))


def show_job(display: ProgressDisplay, progress: Any) -> None:
    """Shows a `batch.Progress`."""
    for note in progress.notes:
        display.tell(note)
    note = f"{progress.audio_seconds / 3600:.2f} h of audio, RTFx {progress.rtfx:.0f}, {progress.failed} failed"
    display.show(progress.resumed + progress.done, progress.entries, note)
