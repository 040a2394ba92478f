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
    """The files of a directory that travel, by path in it, in order; a link that leads out of it is none."""
    root = directory.resolve()
    files = [path for pattern in ("*", "*/*") for path in directory.glob(pattern) if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return sorted(name for name, path in names.items() if travels(name) and root in path.resolve().parents)


def copy_travelling(source: Path, place: Path) -> tuple[str, ...]:
    """Copies what travels, and returns notes on what changes answers and on what stays behind without being known."""
    names = travelling(source)
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
    left = sorted(
        f"{path.name}{'/' if path.is_dir() else ''}"
        for path in source.iterdir()
        if not _is_any(path.name, LEFT_BEHIND) and not any(n.split("/")[0] == path.name for n in names)
    )
    if left:
        notes.append(f"not known, so not copied from the source's directory: {named(left, NAMED)}")
    return tuple(notes)


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of the patterns, part by part: `*` doesn't reach over a slash."""
    parts = name.split("/")
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )
