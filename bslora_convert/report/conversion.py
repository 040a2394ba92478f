"""What stands beside a compact adapter: its page, its card, a training's steps, and the record that speaks of all of them."""

import json
from dataclasses import replace
from pathlib import Path

from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.conversion.writing import Written
from bslora_convert.files.card import CARD_NAME
from bslora_convert.files.record import FIDELITY_NAME, seal
from bslora_convert.report import card
from bslora_convert.results.adapter import Fidelity

REPORT_NAME = "report.html"
TRAINING_NAME = "training.jsonl"


def publish(place: Path, written: Written, *, html: bool = True) -> Fidelity:
    """Writes the page (unless off), the card, the steps of a training and `fidelity.json`, and returns what that holds."""
    record, config = written.record, written.config
    if written.log:
        (place / TRAINING_NAME).write_text("".join(json.dumps(row) + "\n" for row in written.log), encoding="utf-8")
    if html:
        from bslora_convert.report import page  # loads matplotlib, which a refusal need not wait for

        shown = page.render(record, written.spectra, written.log, config.get("base_model_name_or_path"))
        (place / REPORT_NAME).write_text(shown, encoding="utf-8")
    (place / CARD_NAME).write_text(card.render(record, config), encoding="utf-8")
    return replace(record, files=seal(place, FIDELITY_NAME, record.to_dict(), {WEIGHTS_NAME: record.compact.sha256}))
