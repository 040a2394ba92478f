"""How `batch` works through a library: nothing here changes an adapter's result."""

from dataclasses import dataclass

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_count
from bslora_convert.recipe.options import LIBRARY, OUTPUT, option

ENGINE_NAMES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """workers: processes, 0 for this one. shard: (I, N), from 1.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    workers: int = option(1, "Run this many processes, one thread each; 0 = in this one.", LIBRARY, usual="the cores")
    engine: str = option("local", "Run jobs in processes here, or on Ray.", LIBRARY, choices=ENGINE_NAMES)
    shard: tuple[int, int] = option((1, 1), "Do only the I-th of N parts, from 1.", LIBRARY, metavar="I/N", between="/")
    resume: bool = option(True, "Skip what is done for the same source and recipe.", LIBRARY)
    retry_failed: bool = option(False, "Try bad input of an earlier run again.", LIBRARY)
    fail_fast: bool = option(False, "Stop at the first failure.", LIBRARY)
    max_failures: int | None = option(None, "Stop after this many failures.", LIBRARY)
    prune: bool = option(False, "Remove results whose source left the library.", LIBRARY)
    dry_run: bool = option(False, "Check every header and say what would be done.", LIBRARY)
    report_html: bool = option(True, "Write report.html beside each adapter.", OUTPUT)
    overwrite: bool = option(False, "Replace finished results of another recipe in OUT.", OUTPUT)

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINE_NAMES)
        if self.workers < 0:
            raise RecipeError(f"workers is {self.workers}: a whole number from 0 is allowed", "workers")
        index, count = self.shard
        if not 1 <= index <= count:
            raise RecipeError(f"shard is {index}/{count}: I/N with I from 1 to N is allowed", "shard")
        check_count("max_failures", self.max_failures)

    @property
    def failures(self) -> int | None:
        """After how many failures to stop, None for never."""
        return 1 if self.fail_fast else self.max_failures
