"""Results land whole or not at all."""

import errno
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bslora_convert.errors import InputError, OutputError
from bslora_convert.files.landing import HOST, check_apart, check_output, copy_files, landing, replacing
from bslora_convert.files.record import foreign, seal
from bslora_convert.files.tensorfile import write_tensors


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), landing(tmp_path / "out", overwrite=False) as place:
        (place / "file").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == []


def write(out: Path, overwrite: bool = False, **content: str) -> None:
    """A result with its record."""
    with landing(out, overwrite) as place:
        for name, text in content.items():
            (place / name).write_text(text)
        seal(place, "fidelity.json", {"tool_version": "0"})


def test_a_failed_block_keeps_what_it_would_have_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, old="kept")
    with pytest.raises(RuntimeError), landing(out, overwrite=True) as place:
        (place / "new").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == ["out", "out/fidelity.json", "out/old"]


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, old="old")
    write(out, overwrite=True, new="new")
    assert files(tmp_path) == ["deep", "deep/out", "deep/out/fidelity.json", "deep/out/new"]


@pytest.mark.parametrize("stranger", ["thesis.tex", ".git/HEAD", "deep/er/file", "empty/", "link", "old"])
def test_overwrite_touches_no_directory_with_a_stranger_in_it(tmp_path: Path, stranger: str) -> None:
    out = tmp_path / "out"
    write(out, old="ours")
    if stranger == "link":
        (out / stranger).symlink_to(tmp_path)
    elif stranger.endswith("/"):
        (out / stranger).mkdir()
    else:
        (out / stranger).parent.mkdir(parents=True, exist_ok=True)
        (out / stranger).write_text("mine")  # `old`: a file of ours that was edited
    before = files(tmp_path)
    for act in (lambda: check_output(out, overwrite=True), lambda: write(out, overwrite=True)):
        with pytest.raises(OutputError, match=re.escape(stranger.split("/")[0])):
            act()
    assert files(tmp_path) == before


def test_overwrite_replaces_no_directory_without_a_record(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "fidelity.json").write_text(
        '{"files": {"adapter_config.json": {}}}'
    )  # a file of that name is no record of ours
    with pytest.raises(OutputError, match=r"adapter_config\.json"):
        check_output(out, overwrite=True)


def test_what_is_recorded_in_folders_is_ours_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with landing(out, overwrite=False) as place:
        (place / "templates" / "deep").mkdir(parents=True)
        (place / "templates" / "deep" / "one").write_text("x")
        seal(place, "expansion.json", {"tool_version": "0"})
    assert foreign(out) == []
    (out / "templates" / "two").write_text("mine")
    assert foreign(out) == ["templates/two"]
    (out / "templates" / "deep" / "one").unlink()  # less than was written is no stranger
    (out / "templates" / "two").unlink()
    assert foreign(out) == []


def test_a_link_stays_and_what_it_means_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write(real, old="x")
    link.symlink_to(real)
    write(link, overwrite=True, new="y")
    assert link.is_symlink()
    assert files(tmp_path) == ["link", "real", "real/fidelity.json", "real/new"]
    (real / "mine").write_text("x")
    with pytest.raises(OutputError, match="mine"):
        write(link, overwrite=True, new="z")


def test_a_source_and_its_result_lie_apart(tmp_path: Path) -> None:
    source = tmp_path / "lib" / "source"
    source.mkdir(parents=True)
    (source / "weights").write_text("x")
    for out in (source, source / "in", source / "deep" / "er", tmp_path / "lib", tmp_path):
        for given in (source, source / "weights"):
            with pytest.raises(InputError, match="source"):
                check_apart(given, out)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(InputError, match="inside"):
        check_apart(source, tmp_path / "link" / "out")
    check_apart(source, tmp_path / "lib" / "out")


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
    dead, living = tmp_path / f".out.partial-{HOST}-999999999", tmp_path / f".out.partial-{HOST}-{os.getppid()}"
    for left in (dead, living):
        left.mkdir()
        (left / "half").write_text("x")
    with landing(tmp_path / "out", overwrite=False) as place:
        (place / "file").write_text("x")
    assert not dead.exists()
    assert living.exists()


def test_what_a_killed_run_moved_aside_comes_back_or_goes(tmp_path: Path) -> None:
    old = tmp_path / f".out.old-{HOST}-999999999"
    old.mkdir()
    (old / "file").write_text("before")
    with pytest.raises(OutputError, match="not empty"), landing(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out" / "file").read_text() == "before"
    old.mkdir()
    with replacing(tmp_path / "out") as place:
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


def test_another_hosts_unfinished_result_is_let_be(tmp_path: Path) -> None:
    theirs = tmp_path / ".out.partial-00000000-999999999"
    theirs.mkdir()
    write(tmp_path / "out", new="x")
    assert theirs.is_dir()


@pytest.mark.parametrize("there", ["nothing", "an empty directory"])
def test_what_was_put_there_meanwhile_is_kept(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()
    with pytest.raises(OutputError, match="was changed while this ran"), landing(out, overwrite=True) as place:
        (place / "ours").write_text("x")
        write(out, theirs="y")  # another run, which was faster
    assert files(tmp_path) == ["out", "out/fidelity.json", "out/theirs"]


@pytest.mark.parametrize("change", ["added", "edited", "removed", "replaced"])
def test_what_was_changed_meanwhile_is_not_replaced(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    write(out, old="ours")
    with pytest.raises(OutputError, match="was changed while this ran"), landing(out, overwrite=True) as place:
        (place / "new").write_text("x")
        if change == "added":
            (out / "thesis.tex").write_text("mine")
        elif change == "edited":
            (out / "old").write_text("mine")
        elif change == "removed":
            (out / "old").unlink()
        else:
            write(out, overwrite=True, other="y")
    names = {"added": ["old", "thesis.tex"], "edited": ["old"], "removed": [], "replaced": ["other"]}[change]
    assert files(tmp_path) == ["out", *sorted(f"out/{name}" for name in ["fidelity.json", *names])]


def test_a_file_in_the_place_of_a_result_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError), landing(out, overwrite=False) as place:
        (place / "ours").write_text("x")
        out.write_text("mine")
    assert out.read_text() == "mine" and files(tmp_path) == ["out"]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A directory of a lower layer: it is not renamed, what is in it is."""
    rename = Path.rename
    lower: set[Path] = set()

    def refusing(self: Path, target: Path) -> Path:
        if self in lower:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    return lower.add


def test_a_directory_that_can_not_be_renamed_is_moved_file_by_file(
    tmp_path: Path, layers: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    with landing(out, overwrite=False) as place:
        (place / "folder").mkdir()
        (place / "folder" / "old").write_text("x")
        (place / "link").symlink_to("folder")
        seal(place, "fidelity.json", {"tool_version": "0", "files": {}})
    (out / "link").unlink()
    layers(out)
    write(out, overwrite=True, new="y")
    assert files(tmp_path) == ["out", "out/fidelity.json", "out/new"]


def test_what_a_killed_run_moved_file_by_file_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, one="1", two="2")
    moved = tmp_path / f".out.moved-{HOST}-999999999"
    moved.mkdir()
    (out / "one").rename(moved / "one")
    check = pytest.raises(OutputError, match="not empty")
    with check, landing(out, overwrite=False):
        pass
    assert files(tmp_path) == ["out", "out/fidelity.json", "out/one", "out/two"]


def test_what_came_after_a_killed_run_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, one="newer")
    moved = tmp_path / f".out.moved-{HOST}-999999999"
    moved.mkdir()
    (moved / "one").write_text("older")
    (moved / "two").write_text("older")
    with pytest.raises(OutputError, match="not empty"), landing(out, overwrite=False):
        pass
    assert (out / "one").read_text() == "newer" and (out / "two").read_text() == "older"
    assert (moved / "one").read_text() == "older"


def test_both_are_kept_where_another_came_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, old="x")
    rename = Path.rename

    def raced(self: Path, target: Path) -> Path:
        done = rename(self, target)
        if self == out:  # right after it was moved aside
            (target / "old").write_text("edited")
            out.mkdir()
            (out / "theirs").write_text("y")
        return done

    monkeypatch.setattr(Path, "rename", raced)
    words = pytest.raises(OutputError, match=r"what stood there before is .*out\.before-")
    with words, landing(out, overwrite=True) as place:
        (place / "new").write_text("z")
    (kept,) = tmp_path.glob("out.before-*")
    assert (kept / "old").read_text() == "edited" and (out / "theirs").read_text() == "y"


def test_a_mount_without_modes_takes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "utime", "chown"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(Path, "chmod", refused)
    write_tensors(tmp_path / "file.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    copy_files(tmp_path / "in", tmp_path / "copied")
    assert (tmp_path / "copied" / "file").read_text() == "x"


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="no mount to try it with")
def test_a_mount_is_not_replaced() -> None:
    with pytest.raises(OutputError, match="mounted there"):
        check_output(Path("/proc"), overwrite=True)


def test_on_a_real_file_system_of_layers(tmp_path: Path) -> None:
    lower, upper, work, seen = (tmp_path / name for name in ("lower", "upper", "work", "seen"))
    for place in (lower, upper, work, seen):
        place.mkdir()
    write(lower / "out", old="x")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(seen)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount one here")
    try:
        write(seen / "out", overwrite=True, new="y")
        assert files(seen) == ["out", "out/fidelity.json", "out/new"]
    finally:
        subprocess.run(["umount", str(seen)], check=True)
