"""What an output of `batch` was made with, kept in `OUT/.batch/recipe.json`: the mark by which a directory is its own.

A run with another recipe would replace finished results by others, so it has to be asked for; without a recipe the kept one
goes on. Where and on how many workers a run computes is not part of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError, OutputError
from bslora_convert.files.address import STATE
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replace_file
from bslora_convert.lora.place import locate
from bslora_convert.recipe.files import spelled
from bslora_convert.recipe.storage import began_from

NAME = "recipe.json"
SCHEMA_VERSION = 1
FILES = ("prompts", "finetune", "groups")  # options that may name a file whose content counts
FREE = ("device",)  # options that change where, not what


@dataclass(frozen=True, slots=True)
class MadeWith:
    """library: as given, absolute where it is a path. recipe, training: options by name. files: hashes of what they name."""

    library: str
    recipe: Mapping[str, Any]
    training: Mapping[str, Any]
    report_html: bool = True
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of the options, of what the files that they name hold, and of nothing else that a result depends on."""
        text = json.dumps(
            [{**self.recipe, **dict.fromkeys(FREE)}, self.files, self.training, self.report_html], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def of(cls, library: str, recipe: Mapping[str, Any], training: Mapping[str, Any], report_html: bool) -> "MadeWith":
        """What a run makes its results with, with the hashes of the files that its options name."""
        place = library if "://" in library else str(Path(library).absolute())
        named = {name: Path(str(recipe[name])) for name in FILES if recipe.get(name) is not None}
        files = {name: sha256(path) for name, path in named.items() if path.is_file()}
        began = began_from(recipe.get("init"))
        if began is not None and Path(began).is_dir():
            files["init"] = sha256(locate(Path(began))[1])
        return cls(place, recipe, training, report_html, files)

    def differences(self, now: "MadeWith") -> list[str]:
        """What another run would do differently, as options with both values."""
        pairs: list[tuple[str, Any, Any]] = [("report_html", self.report_html, now.report_html)]
        for old, new in ((self.recipe, now.recipe), (self.training, now.training)):
            names = sorted({*old, *new} - set(FREE))
            pairs += [(name, old.get(name), new.get(name)) for name in names]
        found = [
            f"{spelled(name)} (there {_word(before)}, now {_word(after)})"
            for name, before, after in pairs
            if before != after
        ]
        for name in sorted({*self.files, *now.files}):
            if self.recipe.get(name) == now.recipe.get(name) and self.files.get(name) != now.files.get(name):
                found.append(f"the content of {spelled(name)} {now.recipe.get(name)}")
        return found

    def keep(self, out: Path) -> None:
        """Writes them.

        :raises OutputError: when that fails.
        """
        replace_file(
            out / STATE / NAME, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n"
        )


def read_made_with(out: Path) -> MadeWith | None:
    """What an output was made with; None where it is no output of `batch`.

    :raises InputError: when the file is damaged.
    """
    path = out / STATE / NAME
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        found = MadeWith(**{name: value[name] for name in MadeWith.__dataclass_fields__})
        if not all(isinstance(part, dict) for part in (found.recipe, found.training, found.files)):
            raise TypeError
    except (KeyError, TypeError):
        raise InputError(f"{path}: does not say what the output was made with; it is damaged") from None
    return found


def settle(out: Path, now: MadeWith, overwrite: bool) -> MadeWith:
    """The settings of this run in an output that is empty, new or `batch`'s own.

    :raises OutputError: when it is something else, or holds results of another recipe and `overwrite` isn't given.
    """
    before = read_made_with(out)
    if before is None:
        if out.exists() and not _is_empty(out):
            raise OutputError(
                f"{out}: not empty, and not made by `batch`; a new or empty directory is expected, so that nothing of yours is "
                "written over"
            )
        return now
    different = before.differences(now)
    if different and not overwrite and _has_results(out):
        raise OutputError(
            f"{out}: holds results of another recipe: {'; '.join(different)}. `batch {out} --resume` goes on with its own; "
            "--overwrite replaces them"
        )
    return now


def _is_empty(out: Path) -> bool:
    """Whether a directory holds nothing, or just what a run left that was ended before it began."""
    if not out.is_dir():
        return False
    entries = list(out.iterdir())
    return not entries or (entries == [out / STATE] and not any((out / STATE).iterdir()))


def _has_results(out: Path) -> bool:
    for marker in (out / STATE).glob("*.json"):
        try:
            if json.loads(marker.read_text(encoding="utf-8"))["status"] == "ok":
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _word(value: object) -> str:
    return "not given" if value is None else f"{value}"
