"""Results land whole or not at all."""

import os
from pathlib import Path

import pytest

from bslora_convert.errors import OutputError
from bslora_convert.files.landing import check_output, landing


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), landing(tmp_path / "out", overwrite=False) as place:
        (place / "file").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == []


def test_a_failed_block_keeps_what_it_would_have_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    with pytest.raises(RuntimeError), landing(out, overwrite=True) as place:
        (place / "new").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == ["out", "out/old"]


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for name in ("old", "new"):
        with landing(out, overwrite=True) as place:
            (place / name).write_text(name)
    assert files(tmp_path) == ["deep", "deep/out", "deep/out/new"]


def test_a_non_empty_output_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with landing(out, overwrite=False) as place:
        (place / "file").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(out, overwrite=False)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        check_output(file, overwrite=True)


def test_what_a_killed_run_left_is_removed_but_not_what_a_living_one_writes(tmp_path: Path) -> None:
    dead, living = tmp_path / ".out.partial-999999999", tmp_path / f".out.partial-{os.getppid()}"
    for left in (dead, living):
        left.mkdir()
        (left / "half").write_text("x")
    with landing(tmp_path / "out", overwrite=False) as place:
        (place / "file").write_text("x")
    assert not dead.exists()
    assert living.exists()


def test_what_a_killed_run_moved_aside_comes_back_or_goes(tmp_path: Path) -> None:
    old = tmp_path / ".out.old-999999999"
    old.mkdir()
    (old / "file").write_text("before")
    with pytest.raises(OutputError, match="not empty"), landing(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out" / "file").read_text() == "before"
    old.mkdir()
    with landing(tmp_path / "out", overwrite=True) as place:
        (place / "file").write_text("after")
    assert not old.exists()
    assert (tmp_path / "out" / "file").read_text() == "after"


def test_writing_errors_are_output_errors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"), landing(tmp_path / "out", overwrite=False) as place:
        (place / "no" / "such" / "directory").write_text("x")
    assert files(tmp_path) == []


def test_the_current_directory_and_a_librarys_addresses_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "work" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for out in (Path(), tmp_path / "work", inside):
        with pytest.raises(OutputError, match="current directory"):
            check_output(out, overwrite=True)
    with pytest.raises(OutputError, match="`batch` alone writes"):
        check_output(tmp_path / "library::id", overwrite=False)
