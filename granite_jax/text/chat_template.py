"""Chat templates: from an instruction to the token ids around the audio."""

from __future__ import annotations

import functools
import json
import re
import secrets
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from granite_jax.errors import PromptError

if TYPE_CHECKING:
    from granite_jax.text.tokenizer import SpecialToken, Tokenizer

MAX_PROMPT_CHARS = 8192
MAX_TEMPLATE_CHARS = 1 << 18

# After the instruction, a template has special tokens, and at most a word between them: a role.
_ROLE = re.compile(r"[\W_]*\w{0,20}[\W_]*")
_INSTRUCTION = re.compile(r"\b(transcribe|translate)\b", re.IGNORECASE)
_RENDER_SECONDS = 20  # More than the worker allows itself, so that it reports the reason.
_STAND_IN = "text" + secrets.token_hex(16)
"""Takes the instruction's place while the template is rendered; no template or text can contain it by design."""


@dataclass(frozen=True)
class PromptTokens:
    """Token ids before and after the run of audio tokens, which neither includes."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template: Jinja source as in `chat_template.jinja`, or None for Granite Speech 4.0's format.

    The source is untrusted and rendered in a separate process with limits on steps, memory and time, once for all
    instructions. A template that asks for the date keeps that of its first rendering.
    """

    source: str | None = None
    bos_token: str = "<|end_of_text|>"
    eos_token: str = "<|end_of_text|>"
    audio_token: str = "<|audio|>"

    def tokens(self, tokenizer: Tokenizer, instruction: str, max_chars: int = MAX_PROMPT_CHARS) -> PromptTokens:
        """The ids of one user turn, `<|audio|>` and then the instruction, up to where the answer begins.

        Special tokens of the template are interpreted; in the instruction they are plain text. Between special tokens,
        template and instruction are encoded together, so that the ids are those of the rendered text as a whole.

        Raises:
          PromptError: the instruction is not one line of at most `max_chars` characters, or the template is faulty,
            exceeds its limits, drops or alters the instruction, gives one of its own, or does not have the audio
            exactly once.
          CheckpointError: the tokenizer has no audio token.
        """
        check_text("instruction", instruction, max_chars)
        core = instruction.strip()  # Space around it is rendered with the template, which may strip it.
        start = instruction.index(core)
        rendered = self._render(instruction[:start], instruction[start + len(core) :])
        specials = tokenizer.find_special(rendered)
        _check_stand_in(rendered, specials)
        audio_id = tokenizer.special_id(self.audio_token)
        audio = self._find_audio(specials, audio_id)
        split = specials[audio]
        tokens = PromptTokens(
            prefix=_encode_rendered(tokenizer, rendered[: split.start], 0, specials[:audio], core),
            suffix=_encode_rendered(tokenizer, rendered, split.end, specials[audio + 1 :], core),
        )
        if audio_id in tokens.prefix + tokens.suffix:  # Possible only if the file does not call it special.
            raise PromptError(f"instruction {core!r:.60}: must not contain {self.audio_token}")
        return tokens

    def _render(self, before: str, after: str) -> str:
        content = f"{self.audio_token}{before}{_STAND_IN}{after}"
        if self.source is None:
            return f"USER: {content}\n ASSISTANT:"
        return _render_isolated(self.source, content, self.bos_token, self.eos_token)

    def _find_audio(self, specials: list[SpecialToken], audio_id: int) -> int:
        positions = [index for index, special in enumerate(specials) if special.id == audio_id]
        if len(positions) != 1:
            raise PromptError(f"chat template: has {self.audio_token} {len(positions)} times, expected once")
        return positions[0]


def check_text(name: str, text: str, max_chars: int = MAX_PROMPT_CHARS) -> str:
    """Returns `text` if it is one line of readable text: a line feed would let it open another turn."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a string, not {type(text).__name__}")
    if not text.strip():
        raise PromptError(f"{name} is empty")
    if len(text) > max_chars:
        raise PromptError(f"{name} has {len(text)} characters, at most {max_chars} are accepted")
    control = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")), None)
    if control is not None:
        raise PromptError(f"{name} {text!r:.60} has the control character {control!a}")
    return text


def _check_stand_in(rendered: str, specials: list[SpecialToken]) -> None:
    if rendered.count(_STAND_IN) != 1:
        raise PromptError(f"chat template: has the instruction {rendered.count(_STAND_IN)} times, expected once")
    start = rendered.index(_STAND_IN)
    if any(special.start < start + len(_STAND_IN) and special.end > start for special in specials):
        raise PromptError("chat template: the tokenizer takes ordinary letters for special tokens")
    later = [special for special in specials if special.start > start]
    starts, ends = [start + len(_STAND_IN), *(s.end for s in later)], [*(s.start for s in later), len(rendered)]
    for begin, end in zip(starts, ends, strict=True):
        if not _ROLE.fullmatch(rendered[begin:end]):
            raise PromptError(f"chat template: says more than the instruction ({rendered[begin:end].strip()!r:.60})")
    if (own := _INSTRUCTION.search(rendered[:start])) is not None:
        raise PromptError(f"chat template: gives an instruction of its own ({own[0]!r:.40})")


def _encode_rendered(
    tokenizer: Tokenizer, rendered: str, start: int, specials: list[SpecialToken], instruction: str
) -> tuple[int, ...]:
    """The ids of `rendered` from `start` on, given the special tokens in it."""
    ids: list[int] = []
    for special in specials:
        ids += [*_encode_span(tokenizer, rendered[start : special.start], instruction), special.id]
        start = special.end
    return (*ids, *_encode_span(tokenizer, rendered[start:], instruction))


def _encode_span(tokenizer: Tokenizer, span: str, instruction: str) -> list[int]:
    """Encodes the text between two special tokens as a whole, so that merges cross from template to instruction."""
    ids = tokenizer.encode(span.replace(_STAND_IN, instruction))
    if not tokenizer.special_ids.isdisjoint(ids):
        raise PromptError(f"instruction {instruction!r:.60}: the tokenizer makes special tokens of ordinary text")
    return ids


@functools.lru_cache(maxsize=64)
def _render_isolated(source: str, content: str, bos_token: str, eos_token: str) -> str:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise PromptError(f"chat template: has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are accepted")
    context = {
        "messages": [{"role": "user", "content": content}],
        "add_generation_prompt": True,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    worker = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
    request = json.dumps({"source": source, "context": context}).encode()
    try:
        process = subprocess.run(worker, input=request, capture_output=True, timeout=_RENDER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PromptError(f"chat template: rendering took more than {_RENDER_SECONDS} seconds") from None
    except OSError as error:
        raise PromptError(f"chat template: the rendering process cannot be started ({error})") from error
    try:
        reply = json.loads(process.stdout)
    except ValueError:
        # A process that its limits kill leaves no reply, and no message fit to repeat.
        raise PromptError("chat template: needs too much memory, time or nesting to render") from None
    if "text" not in reply:
        raise PromptError(f"chat template: {str(reply.get('error'))[:300]}")
    return reply["text"]
