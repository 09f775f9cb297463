"""Renders one chat template, in a separate process: `python template_worker.py < request.json > reply.json`.

A template is a program from a checkpoint nobody vouches for. minijinja gives it no access to Python, and `fuel` bounds
its steps, but not, or not in all versions, its memory (`x = x ~ x` forty times) and its stack (a sum of forty thousand
lists): only the limits on this process do, and they can kill it.
Request: {"source", "context"}; reply: {"text"} or {"error"}. Imports nothing of granite_jax, whose import is slow.
"""

import contextlib
import datetime
import json
import sys
from typing import Any

FUEL = 200_000
MAX_MEMORY_BYTES = 1 << 29
MAX_CPU_SECONDS = 5
MAX_TEXT = 1 << 16


def limit_process() -> None:
    """Bounds memory and time and suppresses core dumps, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows: `fuel` and the caller's timeout remain.
        return
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
    ]
    for kind, limit in limits:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def render(source: str, context: dict[str, Any]) -> str:
    """Renders `source` as transformers would: same whitespace settings, same functions and filters."""
    import minijinja

    def raise_exception(message: str) -> None:
        raise minijinja.TemplateError(message)

    environment = minijinja.Environment(
        fuel=FUEL,
        debug=False,
        trim_blocks=True,
        lstrip_blocks=True,
        globals={
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        },
        filters={"tojson": lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)},
    )
    return environment.render_str(source, **context)


def main() -> None:
    """Reads a request from stdin and writes the reply to stdout."""
    request = json.load(sys.stdin)
    limit_process()
    try:
        text = render(request["source"], request["context"])
        reply = {"text": text} if len(text) <= MAX_TEXT else {"error": f"more than {MAX_TEXT} characters of prompt"}
    except BaseException as error:  # The extension's PanicException is not an Exception.
        reply = {"error": (str(error).splitlines() or [type(error).__name__])[0]}  # Further lines quote the source.
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
