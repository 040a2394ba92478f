"""What a conversion says about itself: fidelity.json, report.html and the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.bslora.storage import CompactAdapter
from bslora_convert.report import card, page
from bslora_convert.report.page import with_functional

REPORT_NAME = "report.html"
CARD_NAME = "README.md"
TRAINING_NAME = "training.jsonl"

__all__ = ["CARD_NAME", "REPORT_NAME", "TRAINING_NAME", "with_functional", "write"]


def write(
    place: Path,
    record: Mapping[str, Any],
    spectra: Mapping[str, Tensor],
    compact: CompactAdapter,
    *,
    html: bool = True,
    log: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the page (unless off) and the card of a record into a directory; the steps of a training, if any, beside them."""
    if log:
        (place / TRAINING_NAME).write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    if html:
        base_model = compact.config.get("base_model_name_or_path")
        (place / REPORT_NAME).write_text(page.render(record, spectra, log, base_model), encoding="utf-8")
    (place / CARD_NAME).write_text(card.render(record, compact.config), encoding="utf-8")
