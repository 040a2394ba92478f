"""From a name to what vLLM is told, whatever happens: a path that it loads, a path whose loading fails, or nothing.

    a directory     200                    the tenant's LoRA
    `refused`       400 by vLLM            damaged, of another base, not servable, no room; the reason is in the log
    None            404 by vLLM            no such tenant

vLLM calls a resolver outside of what it guards, so an exception would be answered by 500 and a closed connection.
"""

import logging
import time
from pathlib import Path

from bslora_convert.errors import BsloraConvertError
from bslora_convert.vllm.counters import HIT, LOADED, REFUSED, UNKNOWN, Outcomes
from bslora_convert.vllm.tenants import Tenants

LONGEST = 80  # letters of a name that a line of log shows


class Resolver:
    """Answers names; never raises."""

    def __init__(self, tenants: Tenants, log: logging.Logger) -> None:
        self.tenants, self.log, self.outcomes = tenants, log, Outcomes()

    def answer(self, name: str, base: str) -> Path | None:
        """What vLLM is to load for a name; `refused` and None as the module says."""
        began = time.perf_counter()
        shown = repr(name[:LONGEST])
        try:
            tenant = self.tenants.find(name, base)
        except BsloraConvertError as error:
            return self._refused(shown, str(error))
        except Exception as error:  # a full disk, for instance: one tenant's trouble, not the server's
            return self._refused(shown, f"{type(error).__name__}: {error}")
        spent = 1000 * (time.perf_counter() - began)
        if tenant is None:
            self.outcomes.add(UNKNOWN)
            self.log.info("bslora: %s is no tenant (%.0f ms; %s)", shown, spent, self.outcomes.words())
            return None
        self.outcomes.add(LOADED if tenant.written else HIT)
        what = "decoded" if tenant.written else "decoded before"
        self.log.info("bslora: %s, %d bytes, %s, %.0f ms (%s)", shown, tenant.bytes, what, spent, self.outcomes.words())
        return tenant.path

    def _refused(self, shown: str, reason: str) -> Path:
        self.outcomes.add(REFUSED)
        self.log.warning("bslora: %s is refused: %s (%s)", shown, reason, self.outcomes.words())
        return self.tenants.snapshots.refused
