"""A stand-in of the Hub's API on loopback, as far as huggingface_hub asks for it: repositories of files, read and committed."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

HEAD = "main"
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|preupload|commit|paths-info)/(?P<revision>[^/?]+)(?P<rest>.*))?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Hub:
    """repos: files by name, by repository. commits: what each held. tokens: what was sent to log in. cards: that were checked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.tokens: set[str | None] = set()
        self.cards: list[str] = []
        self.fails = False

    def revision(self, repo: str) -> str:
        """A hash of all that a repository holds."""
        said = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(self.repos[repo].items())})
        return hashlib.sha1(said.encode()).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[Hub, str]]:
    """(The stand-in, its address) for as long as the block lasts."""
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": held}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield held, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = API.fullmatch(path)
        if match is None:
            self._file(body=True)
            return
        files = self.hub.repos.get(match["repo"])
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif match["what"] in (None, "revision"):
            names = [{"rfilename": name} for name in sorted(files)]
            self._json({"id": match["repo"], "sha": self.hub.revision(match["repo"]), "siblings": names})
        else:
            above = match["rest"].strip("/") + "/" if match["rest"].strip("/") else ""
            known = {name for name in files if name.startswith(above)}
            if "recursive=true" not in urlsplit(self.path).query.lower():
                known = {above + name.removeprefix(above).partition("/")[0] for name in known}
            self._json(self._entries(match["repo"], sorted(known)))

    def _entries(self, repo: str, names: list[str]) -> list[dict[str, Any]]:
        """What the API says of files and folders; nothing of what is not there."""
        files = self.hub.repos[repo]
        said: list[dict[str, Any]] = []
        for name in names:
            if name in files:
                oid = hashlib.sha1(files[name]).hexdigest()
                said.append({"type": "file", "path": name, "size": len(files[name]), "oid": oid})
            elif any(file.startswith(f"{name}/") for file in files):
                said.append({"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()})
        return said

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if self.hub.fails:
            self._json({"error": "no room"}, 507)
            return
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = repo in self.hub.repos
            self.hub.repos.setdefault(repo, {})
            self._json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo}, 409 if known else 200)
            return
        if path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(data)["content"])
            self._json({"errors": [], "warnings": []})
            return
        match = API.fullmatch(path)
        assert match is not None, path
        repo = match["repo"]
        if match["what"] == "paths-info":
            self._json(self._entries(repo, parse_qs(data.decode()).get("paths", [])))
            return
        if match["what"] == "preupload":
            asked = json.loads(data)["files"]
            self._json({
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            })  # fmt: skip
            return
        names = []
        for line in data.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.hub.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                names.append(entry["value"]["path"])
        self.hub.commits.append((repo, names))
        oid = self.hub.revision(repo)
        self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}"}
        )

    def _file(self, body: bool) -> None:
        match = FILE.fullmatch(unquote(urlsplit(self.path).path))
        data = self.hub.repos.get(match["repo"], {}).get(match["name"]) if match else None
        if match is None or data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.revision(match["repo"]))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None, body: bool = True) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, said in (headers or {}).items():
            self.send_header(name, said)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
