"""Tokenizer files that travel along with an adapter."""

import shutil
from pathlib import Path

TOKENIZER_FILES = (
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


def copy_tokenizer(source: Path, place: Path) -> None:
    """Copies the tokenizer files that `source` has."""
    for name in TOKENIZER_FILES:
        file = source / name
        if file.is_file():
            shutil.copyfile(file, place / name)
