"""A directory of a store: what it holds, what a copy of it brings, and what it may not do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from bslora_convert.errors import InputError, RecipeError
from bslora_convert.files.store import Store, as_written, parts_of


@pytest.fixture
def store() -> Iterator[Store]:
    memory = fsspec.filesystem("memory")
    for name in ("a.json", "in/b.json", "in/deep/c.json"):
        memory.pipe(f"/bucket/top/{name}", name.encode())
    memory.pipe("/bucket/beside.json", b"beside")
    yield Store.at("memory://bucket/top")
    memory.rm("/bucket", recursive=True)


def test_what_is_in_it(store: Store) -> None:
    assert sorted(store.names()) == ["a.json", "in/b.json", "in/deep/c.json"]
    assert sorted(store.names("in")) == ["in/b.json", "in/deep/c.json"]
    assert sorted(store.names(depth=2)) == ["a.json", "in/b.json"]
    assert store.names("nowhere") == []
    assert [store.bytes_of(name) for name in ("a.json", "in", "nowhere.json")] == [6, None, None]
    store.filesystem.pipe("/bucket/top/a.json", b"longer than it was")
    assert store.bytes_of("a.json") == 18


def test_copies_keep_their_paths_and_nothing_leads_out(store: Store, tmp_path: Path) -> None:
    store.copy(["a.json", "in/deep/c.json"], tmp_path / "out")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")}
    assert found == {"out/a.json", "out/in/deep/c.json"}
    for name in ("../beside.json", "in/../../beside.json"):
        with pytest.raises(InputError, match="leads out of it"):
            store.copy([name], tmp_path / "out")
    with pytest.raises(InputError, match=r"memory://bucket/top/none\.json: can't be fetched"):
        store.copy(["none.json"], tmp_path / "out")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")} == found


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("bucket/top", "no URL"),
        ("s3://key:secret@bucket/top", "credentials"),
        ("https://host/top?secret=1", "credentials"),
        ("memory://bucket/../top", r"without \.\."),
        ("nosuch://bucket/top", "can't be opened"),
    ],
)
def test_addresses_that_are_none(url: str, words: str) -> None:
    with pytest.raises((InputError, RecipeError), match=words) as caught:
        Store.at(url)
    assert "secret" not in str(caught.value)


def test_a_url_that_was_taken_for_a_path_is_one_again() -> None:
    assert as_written(Path("hf://org/name::id")) == "hf://org/name::id"
    assert as_written(Path("some/where")) == "some/where"
    assert parts_of("hf:/org/name@main/sub/") == ("hf", "org/name@main/sub")


class Answers(BaseHTTPRequestHandler):
    """The status that a path names."""

    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "5")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_server_that_fails_is_not_taken_for_a_missing_file() -> None:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web = Store.at(f"http://127.0.0.1:{server.server_port}")
    assert (web.bytes_of("200"), web.bytes_of("404"), web.bytes_of("410")) == (5, None, None)
    for status in ("500", "403"):
        with pytest.raises(InputError, match=f"{status}: can't be fetched"):
            web.bytes_of(status)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="can't be fetched"):
        web.bytes_of("200")
