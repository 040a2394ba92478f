"""Where a verification is kept, and what it may replace.

`save` writes `verify.json` into the compact directory and puts it into that directory's record and page; `out` writes one file
elsewhere. Results on prompts and on tasks stay side by side. What was measured on more rows or items, on another base model or
against another reference is not replaced by less without `overwrite`; nothing of another reference is ever saved.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.adapter import Adapter
from bslora_convert.errors import InputError, OutputError, RecipeError, Unsaved
from bslora_convert.files.address import PAGE
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replace_file
from bslora_convert.files.record import FIDELITY_NAME, text_of
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.results.behaviour import Verification

VERIFY_NAME = "verify.json"
OF_PROMPTS = (
    "prompts", "kl", "kl_ci95", "kl_p99", "agreement", "agreement_ci95", "nll", "perplexity", "base_kl", "retention",
    "retention_ci95", "hidden_error", "generation", "worst",
)  # fmt: skip


OnPage = Callable[[str, Verification], str]


@dataclass(frozen=True, slots=True)
class Saving:
    """Where a result goes: into the compact directory (`save`), or into one file."""

    path: Path
    compact: Adapter
    save: bool
    overwrite: bool
    earlier: Mapping[str, Any] | None

    @classmethod
    def plan(cls, compact: Adapter, asked: VerifyOptions, another_reference: bool) -> "Saving | None":
        """Where this verification is to be kept, None where nowhere; whatever can be refused is refused here.

        :raises RecipeError: when the options don't go together.
        :raises OutputError: when the place can't be written, or holds a file that is none of this tool's.
        """
        save, out = asked.save, Path(asked.out) if asked.out is not None else None
        if save and compact.kind != "bslora":
            raise RecipeError(f"save: {compact.path} is a plain LoRA, which has no record; give out (--out FILE)")
        if save and another_reference:
            raise RecipeError(
                "save: what was measured against another reference is not kept in the directory; give out"
            )
        path = compact.path / VERIFY_NAME if save else out
        if path is None:
            return None
        if not save and compact.kind == "bslora" and compact.path.resolve() in path.resolve().parents:
            raise RecipeError(
                f"out is {path}, in the compact directory: give save (--save), which keeps its record whole"
            )
        place = path.absolute().parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise OutputError(f"{path}: {place} can't be written to")
        return cls(path, compact, save, asked.overwrite, _earlier(path))

    def check(self, reference: Adapter, base_model: str, rows: int | None, asked: VerifyOptions) -> None:
        """Refuses before anything is measured what would replace more by less.

        rows: of the prompts.

        :raises OutputError: naming what is there.
        """
        if self.earlier is None or self.overwrite:
            return
        said = self.earlier
        then = {name: said[name].get("sha256") for name in ("compact", "reference")}
        now = {"compact": self.compact.sha256, "reference": reference.sha256}
        for name, digest in now.items():
            if then[name] != digest:
                raise self._refusal(f"a measurement of another {name} ({said[name].get('path')})")
        if said.get("base_model") != base_model:
            raise self._refusal(f"a measurement on the base model {said.get('base_model')}")
        before = (said.get("prompts") or {}).get("rows", 0)
        if rows is not None and rows < before:
            raise self._refusal(f"a measurement on {before} prompts, and this one has {rows}")
        if asked.limit is not None:
            self._check_items(dict.fromkeys(asked.tasks, asked.limit))

    def keep(self, record: Verification, on_page: OnPage) -> None:
        """Writes a result, together with what was there of the other kind. on_page: puts a result into the directory's page.

        :raises Unsaved: with the result, when it can't be written or an earlier one is of more items.
        """
        try:
            if not self.overwrite:
                self._check_items({task: found.items for task, found in record.tasks.items()})
            merged = _merged(self.earlier, record)
            replace_file(self.path, text_of(merged.to_dict()))
            if self.save:
                self._into_directory(merged, on_page)
        except (OutputError, InputError, OSError) as error:
            raise Unsaved(f"measured, but not kept: {error}", record) from error

    def _check_items(self, items: Mapping[str, int]) -> None:
        """Refuses fewer items of a task than were measured before."""
        for task, count in items.items():
            before = ((self.earlier or {}).get("tasks") or {}).get(task, {}).get("items", 0)
            if count < before:
                raise self._refusal(f"{task} measured on {before} items, and this time there are {count}")

    def _into_directory(self, record: Verification, on_page: OnPage) -> None:
        """The record and the page of the compact directory, as far as it has them."""
        directory = self.compact.path
        fidelity, page = directory / FIDELITY_NAME, directory / PAGE
        if not fidelity.is_file():
            return
        known = read_json(fidelity)
        changed = [self.path]
        if page.is_file():
            replace_file(page, on_page(page.read_text(encoding="utf-8"), record))
            changed.append(page)
        files = known.get("files")
        if isinstance(files, dict):
            files |= {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in changed}
        replace_file(fidelity, text_of({**known, "functional": record.to_dict()}))

    def _refusal(self, what: str) -> OutputError:
        return OutputError(f"{self.path}: holds {what}; give --overwrite to replace it, or another --out")


def _earlier(path: Path) -> dict[str, Any] | None:
    """The verification that a file holds, None where there is none.

    :raises OutputError: when it holds something else.
    """
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except InputError:
        value = {}
    if not all(isinstance(value.get(name), dict) for name in ("compact", "reference", "tasks")):
        raise OutputError(f"{path}: exists, and is no result of verify; it is not replaced")
    return value


def _merged(earlier: Mapping[str, Any] | None, record: Verification) -> Verification:
    """A result with what an earlier one of the same adapters says of what this one did not measure."""
    now = record.to_dict()
    if earlier is None or earlier.get("base_model") != record.base_model:
        return record
    if any(earlier[name].get("sha256") != now[name]["sha256"] for name in ("compact", "reference")):
        return record
    kept = {} if record.prompts is not None else {name: earlier[name] for name in OF_PROMPTS if name in earlier}
    return Verification.from_dict({**now, **kept, "tasks": {**earlier["tasks"], **now["tasks"]}})
