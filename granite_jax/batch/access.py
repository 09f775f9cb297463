"""Where audio may come from: local files below a root, and URLs of an allow-list of protocols.

Manifests are untrusted. URLs are never handed to `fsspec.open`, which would follow chains (`zip::...`) to any protocol.
"""

import contextlib
import functools
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.config
import tenacity

from granite_jax.audio.load import AccessError, open_regular
from granite_jax.errors import AudioError, GraniteError, one_line, printable

PROTOCOLS = ("file", "gs", "s3")
"""Protocols that are allowed by default."""
STORES = ("gs", "s3")
"""Those of object stores."""
KNOWN = (*PROTOCOLS, "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    FileExistsError,
    NotADirectoryError,
    GraniteError,
)
_TIMEOUT = 60.0  # seconds that an https server may be silent
T = TypeVar("T")


def scheme(name: str) -> str | None:
    """The protocol of a URL, or None for a path. That of a data set is `tfds`, which fsspec does not have."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else "tfds" if name.startswith("tfds:") else None


def without_file_scheme(name: str) -> str:
    """The path of a file URL; any other name unchanged."""
    return name[len("file://") :] if scheme(name) == "file" else name


def check_protocols(protocols: Sequence[str]) -> None:
    """Raises GraniteError naming a protocol that is not among the `KNOWN` ones."""
    for protocol in protocols:
        if protocol not in KNOWN:
            raise GraniteError(f"protocol {protocol!r:.40} is not supported, only {', '.join(KNOWN)}")


def retried(call: Callable[[], T]) -> T:
    """Retries transient errors: up to five attempts within seconds."""
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=5)
    policy = tenacity.Retrying(
        retry=tenacity.retry_if_not_exception_type((*_PERMANENT_ERRORS, MemoryError)),
        stop=tenacity.stop_after_attempt(5),
        wait=wait,
        reraise=True,
    )
    return policy(call)


@dataclass(frozen=True)
class AudioStorage:
    """Which audio may be read.

    Fields:
      root: base directory or URL of relative names. Local files must be below it after links are resolved; if it is
        a URL, no local file may be read.
      protocols: the allowed ones; "file" stands for local files.
      options: arguments of fsspec's file systems, by protocol.
    """

    root: str
    protocols: tuple[str, ...] = PROTOCOLS
    options: tuple[tuple[str, dict[str, Any]], ...] = ()

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Opens a seekable file.

        Raises:
          AudioError: the name is not allowed, or is not a regular file; the message omits the name.
          OSError: opening failed; remote file systems can raise other errors, too.
        """
        url = self.resolve(name)
        if scheme(url) is None:
            return open_regular(url)
        protocol, path = self._split(url)
        if protocol == "https":
            check_address(url)
        return self.filesystem(protocol).open(path, "rb", cache_type="readahead", block_size=1 << 22)

    def size(self, name: str) -> int:
        """Bytes of a local file, or of an object of a store, without opening it.

        Raises:
          AudioError: the name is not allowed.
          OSError: the file is missing or out of reach; remote file systems can raise other errors, too.
        """
        url = self.resolve(name)
        if scheme(url) is None:
            return os.stat(url).st_size
        protocol, path = self._split(url)
        return int(self.filesystem(protocol).info(path)["size"])

    def resolve(self, name: str) -> str:
        """The absolute path or URL of a name. Raises AudioError if it is not allowed."""
        if "::" in name and "://" in name:
            raise AccessError("is a chained URL, which is not allowed")
        protocol = scheme(name)
        if protocol == "file":
            name, protocol = without_file_scheme(name), None
            if not name.startswith("/"):
                raise AccessError("is a file URL of another machine")
        if protocol is None and scheme(self.root) is not None:
            if name.startswith("/") or ".." in name.split("/"):
                raise AccessError(f"is a path that leads out of {self.root}")
            name = f"{self.root.rstrip('/')}/{name}"
            protocol = scheme(name)
        if (protocol or "file") not in self.protocols:
            allowed = ", ".join(self.protocols)
            raise AccessError(f"protocol {protocol or 'file'!r:.40} is not allowed, only {allowed} (--allow sets them)")
        if protocol is not None:
            if protocol == "https":
                check_host(name)
            return name
        try:
            path = (self._directory / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
            raise AccessError(f"cannot be read ({one_line(error)})") from error
        if not path.is_relative_to(self._directory):
            raise AccessError(f"is not below {self._directory} (--root sets the directory that files must be below)")
        return str(path)

    @property
    def resolved_root(self) -> str:
        """The root as an absolute path without links, or as a URL without a slash at its end."""
        return str(self._directory) if scheme(self.root) is None else self.root.rstrip("/")

    @functools.cached_property
    def _directory(self) -> Path:
        return Path(self.root).resolve()

    def list_remote(self, source: str, suffixes: Sequence[str]) -> Iterator[str]:
        """URLs of the audio files below a URL that ends in a slash, or that a glob matches."""
        protocol, path = self._split(source)
        if protocol not in self.protocols:
            raise GraniteError(f"{printable(source)}: protocol {protocol!r:.40} is not allowed")
        try:
            files: Any = self.filesystem(protocol)
        except AccessError as error:
            raise GraniteError(f"{printable(source)}: {error}") from None
        is_directory = source.endswith("/")
        paths = retried(lambda: files.find(path) if is_directory else files.glob(path))
        for name in sorted(paths):
            if not is_directory or name.lower().endswith(tuple(suffixes)):
                yield f"{protocol}://{name.lstrip('/')}"

    def filesystem(self, protocol: str) -> fsspec.AbstractFileSystem:
        """fsspec's file system of a protocol. Raises GraniteError if its package is missing or it is out of reach."""
        options: dict[str, Any] = dict(self.options).get(protocol, {})
        if protocol == "https":
            options = {"get_client": _guarded_client, **options}
        try:
            check_store(protocol, options)
            return fsspec.filesystem(protocol, **options)
        except ImportError as error:
            raise GraniteError(f"protocol {protocol} needs pip install 'granite-jax[remote]' ({error})") from None

    @staticmethod
    def _split(url: str) -> tuple[str, str]:
        protocol = scheme(url)
        assert protocol is not None
        return protocol, url if protocol == "https" else url[len(protocol) + 3 :]


_STORE_HOSTS = {"gs": ("gcsfs", "storage.googleapis.com"), "s3": ("s3fs", "s3.amazonaws.com")}  # package and host
_OTHER_HOSTS = ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTPS_PROXY", "https_proxy")
_found: set[str] = set()  # hosts


def check_store(protocol: str, options: Mapping[str, Any]) -> None:
    """Raises AccessError if the host of an object store is not found: its package would try for minutes.

    Nothing is checked where `options`, the environment, fsspec's or AWS's configuration can lead to another host.
    """
    package, host = _STORE_HOSTS.get(protocol, ("", ""))
    if not host or host in _found or options or fsspec.config.conf.get(protocol):
        return
    if any(map(os.environ.get, _OTHER_HOSTS)) or (protocol == "s3" and _aws_has_endpoint()):
        return
    if fsspec.get_filesystem_class(protocol).__module__.partition(".")[0] == package:
        try:
            retried(lambda: socket.getaddrinfo(host, 443))
        except OSError:
            raise AccessError(f"host {host} is not found: is there a network?") from None
        _found.add(host)


def _aws_has_endpoint() -> bool:
    path = os.environ.get("AWS_CONFIG_FILE") or os.path.expanduser("~/.aws/config")
    try:
        return "endpoint_url" in Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


# https may only reach servers on the public Internet, also after a host name is resolved, and where redirects lead.
# The client resolves names again and can get other addresses, so its resolver checks them, too.


def check_host(url: str) -> None:
    """Raises AudioError unless a URL is https without credentials; an IP address must be public and in plain form."""
    try:
        from yarl import URL  # the client's own parser: another one could disagree about the host
    except ImportError:
        raise AccessError("protocol https needs pip install 'granite-jax[remote]'") from None
    try:
        parsed = URL(url)
        host = parsed.host
    except ValueError as error:
        raise AccessError(f"is not a URL ({one_line(error)})") from None
    if parsed.scheme != "https" or not host or parsed.user is not None:
        raise AccessError("is not a plain https URL")
    # To the C library, 2852039166, 0177.0.0.1 and 127.1 are addresses, too; only the plain form is allowed.
    if re.fullmatch(r"[0-9.]+|.*:.*|0x[0-9a-f.x]*", host.lower()):
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host).is_global:
                return
        raise AccessError(f"host {host} is not on the public Internet")


def check_address(url: str) -> None:
    """Raises AudioError unless all addresses of a URL's host are on the public Internet."""
    from yarl import URL

    parsed = URL(url)
    try:
        addresses = socket.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AccessError(f"host {parsed.host} is not found ({one_line(error.strerror)})") from None
    if not all(ipaddress.ip_address(address[0]).is_global for *_, address in addresses):
        raise AccessError(f"host {parsed.host} is not on the public Internet")


async def _guarded_client(loop: Any = None, **options: Any) -> Any:
    import aiohttp

    class PublicResolver(aiohttp.ThreadedResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            addresses = await super().resolve(host, port, family)
            public = [address for address in addresses if ipaddress.ip_address(address["host"]).is_global]
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
