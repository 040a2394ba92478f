"""What stands beside an adapter and travels along: what prepares its inputs, and what changes its answers.

What prepares inputs (tokenizers, processors, chat templates) is copied without a word. What changes answers and is loaded by no
reader of adapters (projectors, value heads, pooling) is copied too, and a note says so. A file that is neither, nor what a
training leaves behind, stays and is named.
"""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from bslora_convert.files.record import named
from bslora_convert.notes import Note

TRAVELLING = (
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "bpe.codes",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "target.spm",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
CHANGING_ANSWERS = (
    "[0-9]*_*/*",  # modules of sentence-transformers: 1_Pooling/config.json, 2_Dense/model.safetensors
    "config_sentence_transformers.json",
    "mm_projector.*",
    "modules.json",
    "non_lora_state_dict.*",
    "non_lora_trainables.*",
    "sentence_bert_config.json",
    "v_head.*",
    "value_head.*",
)
# What a training or a hub leaves beside an adapter; it says nothing of what the adapter does.
LEFT_BEHIND = (
    ".*",
    "*.log",
    "*.md",
    "*.png",
    "*results.json",
    "LICENSE*",
    "NOTICE*",
    "adapter_config.json",
    "adapter_model*",
    "analysis.json",
    "checkpoint-*",
    "comparison.json",
    "expansion.json",
    "fidelity.json",
    "global_step*",
    "latest",
    "logs",
    "optimizer*",
    "ray_*",
    "report.html",
    "rng_state*",
    "runs",
    "scaler.pt",
    "scheduler.pt",
    "state.json",
    "train*",
    "verify.json",
    "wandb",
    "zero_to_fp32.py",
)
NAMED = 6  # files that a note names


def travels(name: str) -> bool:
    """Whether a file travels, by its path in the adapter's directory."""
    return _is_any(name, TRAVELLING) or _is_any(name, CHANGING_ANSWERS)


def travelling(directory: Path) -> list[str]:
    """The files of a directory that travel, by path in it, in order.

    A link is the file that it means where that lies in the directory too, or in the Hub's cache, which keeps files by links.
    """
    return _sorted_out(directory)[0]


def copy_travelling(source: Path, place: Path) -> tuple[str, ...]:
    """Copies what travels; returns notes on what changes answers and on what stays: links to elsewhere, and what is not known."""
    names, elsewhere = _sorted_out(source)
    for name in names:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, place / name)
    notes = []
    changing = [name for name in names if _is_any(name, CHANGING_ANSWERS)]
    if changing:
        said = (
            f"{named(changing, NAMED)} of the source change{'s' if len(changing) == 1 else ''} what the model answers and can't "
            "be compressed: copied unchanged beside the result; loading the adapter alone does not load it"
        )
        notes.append(str(Note(said, "attention")))
    if elsewhere:
        said = f"not copied, for a link leads out of the source's directory: {named(elsewhere, NAMED)}"
        notes.append(str(Note(said, "attention")))
    known = {name.split("/")[0] for name in (*names, *elsewhere)}
    left = sorted(
        f"{path.name}{'/' if path.is_dir() else ''}"
        for path in source.iterdir()
        if not _is_any(path.name, LEFT_BEHIND) and path.name not in known
    )
    if left:
        notes.append(f"not known, so not copied from the source's directory: {named(left, NAMED)}")
    return tuple(notes)


def _sorted_out(directory: Path) -> tuple[list[str], list[str]]:
    """(Files that travel, files that would if no link led elsewhere), by path in the directory."""
    homes = _homes(directory.resolve())
    files = [path for pattern in ("*", "*/*") for path in directory.glob(pattern) if path.is_file()]
    own: list[str] = []
    elsewhere: list[str] = []
    for path in sorted(files):
        name = path.relative_to(directory).as_posix()
        if travels(name):
            (own if any(home in path.resolve().parents for home in homes) else elsewhere).append(name)
    return own, elsewhere


def _homes(directory: Path) -> list[Path]:
    """Where a directory's files may lie: in it; of a snapshot in the Hub's cache among its repository's blobs, or the cache's.

    …/models--org--name/snapshots/<commit>/…    ->    …/models--org--name/blobs, …/blobs
    """
    repository = next((p.parent for p in (directory, *directory.parents) if p.name == "snapshots"), None)
    if repository is None or not repository.name.startswith("models--"):
        return [directory]
    return [directory, repository / "blobs", repository.parent / "blobs"]


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of the patterns, part by part: `*` doesn't reach over a slash."""
    parts = name.split("/")
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )
