"""A hub of models on this machine: the few requests that `huggingface_hub` makes to read one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub:
    """Repositories by name; `requests` are those that were answered."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        """Repositories whose server fails."""
        self.cut: set[str] = set()
        """Files that are sent up to their middle."""
        self.requests: list[str] = []
        self.endpoint = ""

    def environment(self, home: Path) -> Mapping[str, str]:
        """Variables under which `huggingface_hub` talks to this hub, with a cache in ``home``."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextlib.contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """The hub answers while the block runs."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, send: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo, rest = "/".join(parts[:2]), parts[2:]
        self.state.requests.append(f"{self.command} {'/'.join(parts)}")
        files = self.state.repositories.get(repo)
        if files is None:
            return self._error(401, "RepoNotFound", "Repository not found")
        if repo in self.state.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if repo in self.state.broken:
            return self._error(500, "", "it broke")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if api:
            return self._api(rest, files, repo)
        return self._file("/".join(rest[2:]), files, send)

    def _api(self, rest: list[str], files: Mapping[str, bytes], repo: str) -> None:
        if rest[:1] == ["tree"]:
            found: object = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        else:
            found = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self._send(json.dumps(found).encode(), {"Content-Type": "application/json"}, send=True)

    def _file(self, name: str, files: Mapping[str, bytes], send: bool) -> None:
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self._send(data, headers, send, name in self.state.cut)

    def _send(self, data: bytes, headers: Mapping[str, str], send: bool, cut: bool = False) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[start : len(data) // 2 if cut else None])
        self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
