"""Tokenizer files that travel along with an adapter."""

import shutil
from pathlib import Path

TRAVELLING = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def copy_travelling(source: Path, place: Path) -> None:
    """Copies the tokenizer files that `source` has."""
    for name in TRAVELLING:
        file = source / name
        if file.is_file():
            shutil.copyfile(file, place / name)
