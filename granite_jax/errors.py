"""The errors that granite_jax raises for bad input, each a one-line message that names the input and the reason."""


class GraniteError(ValueError):
    """Base of every error about something the caller passed in.

    Fields:
      flags: what else is known of an input that failed, from `results.FLAGS`.
    """

    flags: tuple[str, ...] = ()


class AudioError(GraniteError):
    """An audio file, buffer or array cannot be read, or is not usable speech input."""


class PromptError(GraniteError):
    """A task, language, prompt, keyword or chat template is not usable."""


class BackendError(GraniteError):
    """JAX cannot start the platform that it is to compute on."""


class CheckpointError(GraniteError):
    """A checkpoint or one of its files is missing, damaged or of the wrong kind."""


class ContextError(GraniteError):
    """Audio, prompt and new tokens together need more positions than the model has."""


def one_line(value: object) -> str:
    """The start of another library's message, on one line, for use in this program's messages."""
    return " ".join(str(value).split())[:200]


def printable(name: str) -> str:
    """The name for messages: on one line, whatever characters it contains."""
    return name if name and name.isprintable() else ascii(name)
