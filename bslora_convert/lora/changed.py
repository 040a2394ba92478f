"""Rows of saved tables that training changed: beside the base's table, only they need to be kept.

A table (n, d) that PEFT saved whole, of which the base has the rows 0 … m−1, m ≤ n: a row is kept where it is not the base's,
number by number, in the table's type; rows ≥ m are the adapter's own. What is kept is what PEFT calls trained tokens
(`trainable_token_indices`), which it, and everything here, loads on the same base. Trained tokens of an embedding that is tied to
the head change the head as well, so they are made only where the saved table does that too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bslora_convert.files.base import CONFIG_NAME, base_directory
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import read_headers
from bslora_convert.lora.adapter import LoraAdapter
from bslora_convert.lora.tables import TOKENS

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output")
MOST = 0.5  # of a table's rows: with more, it is kept whole


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A saved table (n, d) and the indices of its rows that are not the base's."""

    module: str
    weight: Tensor
    changed: Tensor

    @property
    def is_head(self) -> bool:
        """Whether it gives the logits."""
        return self.module.rpartition(".")[2] in HEADS


def tables_of(adapter: LoraAdapter) -> list[str]:
    """Modules whose tables a file holds whole, and of which rows could do; none where rows are trained already."""
    if adapter.config.raw.get("trainable_token_indices"):
        return []
    names = [name.removesuffix(".weight") for name, tensor in adapter.carried.items() if tensor.ndim == 2]
    beside = {
        name.rpartition(".")[0] for name in adapter.carried if not name.endswith(".weight")
    }  # a head's bias: saved whole
    known = (*EMBEDDINGS, *HEADS)
    return [n for n in names if n.rpartition(".")[2] in known and n not in adapter.modules and n not in beside]


def only_changed(adapter: LoraAdapter, base_model: str) -> LoraAdapter:
    """The adapter with its saved tables as the rows that are not the base's, where that does the same; and a note on each table.

    :raises InputError: when the base model can't be had, or is damaged.
    """
    place = base_directory(base_model)
    held = {name: file for file in sorted(place.glob("*.safetensors")) for name in read_headers(file)}
    ties, raw = _ties(place, held), adapter.config.raw
    tables, notes = [], []
    for module in tables_of(adapter):
        weight, old = adapter.carried[f"{module}.weight"], _base_table(held, module, ties)
        if old is None or len(old) > len(weight) or old.shape[1:] != weight.shape[1:]:
            notes.append(f"{module} is kept whole: {base_model} holds no table like it")
        else:
            tables.append(Table(module, weight, _changed(weight, old)))
    if ties and tables and not _move_alike(tables, raw):
        notes += [
            f"{table.module} is kept whole: the base ties it to another, and rows would change both" for table in tables
        ]
        tables = []
    twins = [table for table in tables if ties and table.is_head]  # whose rows are the embedding's
    carried, indices = dict(adapter.carried), {}
    for table in [table for table in tables if table not in twins]:
        module, rows = table.module, table.changed.tolist()
        said = f"{len(rows):,} of its {len(table.weight):,} rows are not the base's"
        if len(rows) > MOST * len(table.weight):
            notes.append(f"{module} is kept whole: {said}")
            continue
        for same in (table, *twins):
            del carried[f"{same.module}.weight"]
        if rows:
            carried[f"{module}{TOKENS}"], indices[module] = table.weight[table.changed], rows
        notes.append(f"of {module}, {said}; only these are kept")
    config = replace(adapter.config, raw=_with_tokens(raw, indices, carried))
    return replace(adapter, carried=carried, config=config, notes=(*adapter.notes, *notes))


def _changed(weight: Tensor, old: Tensor) -> Tensor:
    """Indices of the rows that are not the base's in the table's type, or are beyond its end."""
    differs = (weight[: len(old)] != old.to(weight.dtype)).any(dim=1)
    return torch.cat([differs.nonzero().flatten(), torch.arange(len(old), len(weight))])


def _move_alike(tables: list[Table], raw: Mapping[str, Any]) -> bool:
    """Whether saved tables of a base that ties them change embedding and head alike.

    PEFT loads a table that `modules_to_save` does not name into the base's one weight; one that it names, beside it.
    """
    embeddings, heads = [t for t in tables if not t.is_head], [t for t in tables if t.is_head]
    if len(embeddings) != 1 or len(heads) > 1:
        return False
    if heads:
        return torch.equal(heads[0].weight, embeddings[0].weight)
    return not any(f".{embeddings[0].module}".endswith(f".{name}") for name in raw.get("modules_to_save") or ())


def _with_tokens(
    raw: Mapping[str, Any], indices: Mapping[str, list[int]], carried: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A configuration that says which rows are kept, and names no saved modules of which nothing is left."""
    whole = [f".{name}" for name in carried if TOKENS not in name]
    saved = [name for name in raw.get("modules_to_save") or () if any(f".{name}." in left for left in whole)]
    return {**raw, "modules_to_save": saved or None, "trainable_token_indices": dict(indices) or None}


def _base_table(held: Mapping[str, Path], module: str, ties: bool) -> Tensor | None:
    """The base's table of a module: by its name, or by the end of it where one tensor has that.

    held: the base's files, by tensor.
    """
    ends = EMBEDDINGS if ties else (module.rpartition(".")[2],)
    alike = [name for name in held if any(f".{name}".endswith(f".{end}.weight") for end in ends)]
    own = f"{module}.weight"
    name = own if own in held else alike[0] if len(alike) == 1 else None
    if name is None:
        return None
    with safe_open(held[name], framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def _ties(place: Path, held: Mapping[str, Path]) -> bool:
    """Whether head and embedding are one weight: as the configuration says, or else where the files hold no head."""
    config = read_json(place / CONFIG_NAME)
    inner = config.get("text_config")
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    return (
        said
        if isinstance(said, bool)
        else not any(f".{name}".endswith(f".{head}.weight") for name in held for head in HEADS)
    )
