"""What errors and shares of the bytes would cost in codes, forecast from the spectra before anything is computed."""

import math
import shlex
from pathlib import Path
from typing import Any

from bslora_convert.bslora.codes.file import EMPTY_CODES
from bslora_convert.bslora.storage import coded_bytes
from bslora_convert.coding.forecast import Forecast
from bslora_convert.conversion.initial import against
from bslora_convert.fit.source import Source
from bslora_convert.lora import LoraAdapter

ERRORS, SHARES = (0.05, 0.1, 0.2, 0.3), (1 / 4, 1 / 8, 1 / 16)  # that are forecast


def sizes(source: Source, adapter: LoraAdapter, path: Path) -> list[dict[str, Any]]:
    """A row for each error and each share of the bytes: what it would take, what it would lose, and the command for it."""
    size = adapter.weights.stat().st_size
    beside = coded_bytes(EMPTY_CODES, adapter.carried)
    expected = Forecast.of(source.spectra, source.shapes, against(source))

    def row(option: str, value: float, bits: float, lost: float) -> dict[str, Any]:
        count = beside + math.ceil(bits / 8)
        error = math.sqrt(max(lost, 0.0) / source.energy) if source.energy else 0.0
        command = f"bslora-convert compress {shlex.quote(str(path))} OUT --transform none {option} {value:g}"
        return {"option": option, "value": value, "bytes": count, "byte_ratio": count / size, "relative_error": error,
                "command": command}  # fmt: skip

    rows = []
    for error in ERRORS:
        lost = error**2 * source.energy  # unbiased: least squares lose a little less
        rows.append(row("--max-error", error, expected.bits_for(lost / (1 + error**2)), lost))
    for share in SHARES:
        bits = 8 * (math.floor(share * size) - beside)
        if bits > 0:
            rows.append(row("--bytes", share, bits, expected.lost_for(bits)))
    return rows
