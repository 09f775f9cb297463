"""A stand-in for a model hub on this machine, which speaks as much of its protocol as `huggingface_hub` needs."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories of one revision each.

    Fields:
      repositories: id -> (commit, directory). Any revision but the commit's own name and "main" is unknown.
      requests: "METHOD path" of every request so far.
      refused: names of files that are not sent.
      etags: file name -> announced SHA-256, where it is to be another than the file's.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, tuple[str, Path]] = {}
        self.requests: list[str] = []
        self.refused: set[str] = set()
        self.etags: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> list[str]:
        """Names of the files whose content was sent."""
        return [
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(60)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for repo_id, (commit, directory) in self.server.repositories.items():
            for revision in ("main", commit):
                if path in (f"/api/models/{repo_id}/revision/{revision}", f"/api/models/{repo_id}"):
                    return self._send(json.dumps(self._info(repo_id, commit, directory)).encode())
                if path == f"/api/models/{repo_id}/tree/{revision}":
                    return self._send(json.dumps(self._tree(directory)).encode())
                prefix = f"/{repo_id}/resolve/{revision}/"
                if path.startswith(prefix) and (file := directory / path.removeprefix(prefix)).is_file():
                    if file.name in self.server.refused:
                        return self._send(b"", status=403)
                    content = file.read_bytes()
                    etag = self.server.etags.get(file.name, hashlib.sha256(content).hexdigest())
                    return self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        missing = (
            "RevisionNotFound" if any(f"/{name}/" in path for name in self.server.repositories) else "RepoNotFound"
        )
        return self._send(b"{}", {"X-Error-Code": missing, "X-Error-Message": missing}, 404)

    def _info(self, repo_id: str, commit: str, directory: Path) -> dict:
        names = [entry["path"] for entry in self._tree(directory)]
        return {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in names]}

    def _tree(self, directory: Path) -> list[dict]:
        files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
        return [
            {"type": "file", "path": str(file.relative_to(directory)), "size": file.stat().st_size, "oid": "0" * 40}
            for file in files
        ]

    def _send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
