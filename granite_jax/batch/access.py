"""Where audio may come from: local files below a root, and URLs of an allow-list of protocols.

Manifests are untrusted. URLs are never handed to `fsspec.open`, which would follow chains (`zip::...`) to any protocol.
"""

import contextlib
import functools
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity

from granite_jax.audio.load import open_regular, printable
from granite_jax.audio.resample import one_line
from granite_jax.errors import AudioError, GraniteError

PROTOCOLS = ("file", "gs", "s3")
"""What is allowed unless more is asked for."""
KNOWN = (*PROTOCOLS, "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, FileExistsError, NotADirectoryError, GraniteError)
_TIMEOUT = 60.0  # seconds that an https server may be silent
T = TypeVar("T")


def scheme(name: str) -> str | None:
    """The protocol of a URL; None for a path. Data sets have `tfds`, which is none of fsspec's."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else "tfds" if name.startswith("tfds:") else None


def without_file_scheme(name: str) -> str:
    """A path in place of a file URL."""
    return name[len("file://") :] if scheme(name) == "file" else name


def retried(call: Callable[[], T]) -> T:
    """Calls again, up to five times within seconds, what fails for reasons that may pass."""
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=5)
    policy = tenacity.Retrying(
        retry=tenacity.retry_if_not_exception_type((*_FINAL, MemoryError)),
        stop=tenacity.stop_after_attempt(5),
        wait=wait,
        reraise=True,
    )
    return policy(call)


@dataclass(frozen=True)
class AudioStorage:
    """What may be read.

    Fields:
      root: directory or URL that relative names are relative to. Local files have to be below it, links followed;
        with a URL as root there are no local files.
      protocols: of URLs, and "file".
      options: arguments of fsspec's file systems, by protocol.
    """

    root: str
    protocols: tuple[str, ...] = PROTOCOLS
    options: tuple[tuple[str, dict[str, Any]], ...] = ()

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A seekable file.

        Raises:
          AudioError: the name is not allowed, or no regular file, without the name.
          OSError: and whatever else a remote file system raises.
        """
        url = self.resolve(name)
        if scheme(url) is None:
            return open_regular(url)
        protocol, path = self._split(url)
        if protocol == "https":
            check_address(url)
        return self.filesystem(protocol).open(path, "rb", cache_type="readahead", block_size=1 << 22)

    def resolve(self, name: str) -> str:
        """The absolute path or URL of a name. Raises AudioError if it is not allowed."""
        if "::" in name and "://" in name:
            raise AudioError("is a chained URL, which is not allowed")
        protocol = scheme(name)
        if protocol == "file":
            name, protocol = without_file_scheme(name), None
            if not name.startswith("/"):
                raise AudioError("is a file URL of another machine")
        if protocol is None and scheme(self.root) is not None:
            if name.startswith("/") or ".." in name.split("/"):
                raise AudioError(f"is a path that leads out of {self.root}")
            name = f"{self.root.rstrip('/')}/{name}"
            protocol = scheme(name)
        if (protocol or "file") not in self.protocols:
            allowed = ", ".join(self.protocols)
            raise AudioError(f"protocol {protocol or 'file'!r:.40} is not allowed, only {allowed}")
        if protocol is not None:
            if protocol == "https":
                check_host(name)
            return name
        try:
            path = (self._directory / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
            raise AudioError(f"cannot be read ({one_line(error)})") from error
        if not path.is_relative_to(self._directory):
            raise AudioError(f"is not below {self._directory}, the root that was given")
        return str(path)

    @functools.cached_property
    def _directory(self) -> Path:
        return Path(self.root).resolve()

    def list_remote(self, source: str, suffixes: Sequence[str]) -> Iterator[str]:
        """URLs of the audio files below a URL that ends in a slash, or that a glob matches."""
        protocol, path = self._split(source)
        if protocol not in self.protocols:
            raise GraniteError(f"{printable(source)}: protocol {protocol!r:.40} is not allowed")
        files: Any = self.filesystem(protocol)
        is_directory = source.endswith("/")
        found = retried(lambda: files.find(path) if is_directory else files.glob(path))
        for name in sorted(found):
            if not is_directory or name.lower().endswith(tuple(suffixes)):
                yield f"{protocol}://{name.lstrip('/')}"

    def filesystem(self, protocol: str) -> fsspec.AbstractFileSystem:
        """fsspec's file system of a protocol. Raises GraniteError if its package is missing."""
        options: dict[str, Any] = dict(self.options).get(protocol, {})
        if protocol == "https":
            options = {"get_client": _guarded_client, **options}
        try:
            return fsspec.filesystem(protocol, **options)
        except ImportError as error:
            raise GraniteError(f"protocol {protocol} needs pip install 'granite-jax[remote]' ({error})") from None

    @staticmethod
    def _split(url: str) -> tuple[str, str]:
        protocol = scheme(url)
        assert protocol is not None
        return protocol, url if protocol == "https" else url[len(protocol) + 3 :]


# https: servers of the public Internet alone, wherever names and redirects lead. The client resolves names again, and
# may be told something else then.


def check_host(url: str) -> None:
    """Raises AudioError for a host that is a number, unless it is a public one, and for user names and passwords."""
    try:
        from yarl import URL  # the client's own parser: two might disagree on what the host is
    except ImportError:
        raise AudioError("protocol https needs pip install 'granite-jax[remote]'") from None
    try:
        parsed = URL(url)
        host = parsed.host
    except ValueError as error:
        raise AudioError(f"is not a URL ({one_line(error)})") from None
    if parsed.scheme != "https" or not host or parsed.user is not None:
        raise AudioError("is not a plain https URL")
    # 2852039166, 0177.0.0.1 and 127.1 are addresses, too, to the C library: only the plain form is.
    if re.fullmatch(r"[0-9.]+|.*:.*|0x[0-9a-f.x]*", host.lower()):
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host).is_global:
                return
        raise AudioError(f"host {host} is not on the public Internet")


def check_address(url: str) -> None:
    """Raises AudioError for a host whose name leads to another place than the public Internet, or nowhere."""
    from yarl import URL

    parsed = URL(url)
    try:
        found = socket.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AudioError(f"host {parsed.host} is not found ({one_line(error.strerror)})") from None
    if not all(ipaddress.ip_address(address[0]).is_global for *_, address in found):
        raise AudioError(f"host {parsed.host} is not on the public Internet")


async def _guarded_client(loop: Any = None, **options: Any) -> Any:
    import aiohttp

    class PublicResolver(aiohttp.ThreadedResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            found = await super().resolve(host, port, family)
            public = [address for address in found if ipaddress.ip_address(address["host"]).is_global]
            if not public:
                raise PermissionError(f"host {host} is not on the public Internet")
            return public

    async def on_redirect(session: Any, context: Any, params: aiohttp.TraceRequestRedirectParams) -> None:
        location = params.response.headers.get("Location", "")
        try:
            check_host(str(params.url.join(type(params.url)(location))))
        except (AudioError, ValueError) as error:
            raise PermissionError(f"redirect to {location:.200}: {error}") from None

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(on_redirect)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=PublicResolver()),
        trace_configs=[trace],
        timeout=aiohttp.ClientTimeout(total=None, connect=_TIMEOUT, sock_read=_TIMEOUT),
        trust_env=False,
    )
