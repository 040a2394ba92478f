"""What `verify` found, put into the page of a conversion."""

from bslora_convert.report import verdict
from bslora_convert.report.environment import environment
from bslora_convert.results.behaviour import Verification

FUNCTIONAL_BEGIN, FUNCTIONAL_END = "<!-- functional -->", "<!-- /functional -->"


def with_functional(page: str, functional: Verification) -> str:
    """A page of this kind with what `verify` found, in place of the hint or of an earlier run; other pages stay as they are."""
    before, begin, rest = page.partition(FUNCTIONAL_BEGIN)
    _, end, after = rest.partition(FUNCTIONAL_END)
    if not begin or not end:
        return page
    urgent, notes = verdict.attention(functional.notes)
    shown = (
        environment()
        .get_template("functional.html")
        .render(
            f=functional,
            verdict=verdict.behaviour(functional),
            intervals=verdict.intervals(functional),
            thresholds=verdict.thresholds(functional),
            urgent=urgent,
            notes=notes,
        )
    )
    return f"{before}{begin}\n{shown}\n{end}{after}"
