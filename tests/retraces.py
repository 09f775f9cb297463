"""Why a program was traced again: the argument whose type changed, which a count alone does not tell."""

from granite_jax.engine.programs import Programs


def retraces(programs: Programs, expected: int) -> list[str]:
    """A line for each trace beyond the `expected` ones: the program, and how it differs from the most similar trace."""
    return [
        f"{name}: {min((_changes(earlier, trace) for earlier in traces[:number]), key=len)}"
        for name, traces in programs.traces.items()
        for number, trace in enumerate(traces)
        if number >= expected
    ]


def _changes(earlier: dict[str, str], trace: dict[str, str]) -> list[str]:
    paths = earlier | trace
    return [f"{path} was {a}, is {b}" for path in paths if (a := earlier.get(path)) != (b := trace.get(path))]
