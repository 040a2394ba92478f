"""What may be replaced by a compact directory, and what stands beside its adapter."""

from dataclasses import dataclass

from bslora_convert.recipe.options import OUTPUT, option


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Of every verb that writes one compact directory."""

    report_html: bool = option(True, "Write report.html beside the adapter.", OUTPUT)
    overwrite: bool = option(False, "Replace an earlier result in OUT_DIR.", OUTPUT)
