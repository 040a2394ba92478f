"""From a name to what vLLM is told, whatever happens: a path that it loads, nothing, or why it is refused.

a directory     200     the tenant's LoRA
None            404     no such tenant
`Declined`      400     damaged, of another base, not servable, no room, or a fault of the server's own; the answer says which
"""

import logging
import re
import time
from pathlib import Path

from bslora_convert.errors import BsloraConvertError
from bslora_convert.files.scrub import scrubbed
from bslora_convert.vllm.counters import HIT, LOADED, REFUSED, UNKNOWN, Outcomes
from bslora_convert.vllm.snapshots import PARTIAL
from bslora_convert.vllm.tenants import Tenants

BEING_WRITTEN = re.compile(
    rf"\S*{re.escape(PARTIAL)}[^/\s]+/(adapter/)?"
)  # where an adapter's files are while they are looked at
LONGEST = 80  # letters of a name that a line of log shows


class Declined(Exception):
    """Why a name that may be a tenant's is not answered, for whoever asked: no path of the server is in it."""


class Resolver:
    """Answers names; raises `Declined` alone."""

    def __init__(self, tenants: Tenants, log: logging.Logger) -> None:
        self.tenants, self.log, self.outcomes = tenants, log, Outcomes()

    def answer(self, name: str, base: str) -> Path | None:
        """What vLLM is to load for a name; None where it is no tenant's.

        :raises Declined: when it is refused, with the reason that stands in the log.
        """
        began = time.perf_counter()
        shown = repr(name[:LONGEST])
        try:
            tenant = self.tenants.find(name, base)
        except BsloraConvertError as error:
            raise self._declined(shown, str(error)) from None
        except Exception as error:  # a full disk, for instance: one tenant's trouble, not the server's
            raise self._declined(shown, f"{type(error).__name__}: {error}") from None
        spent = 1000 * (time.perf_counter() - began)
        if tenant is None:
            self.outcomes.add(UNKNOWN)
            self.log.info("bslora: %s is no tenant (%.0f ms; %s)", shown, spent, self.outcomes.words())
            return None
        self.outcomes.add(LOADED if tenant.written else HIT)
        what = "decoded" if tenant.written else "decoded before"
        self.log.info("bslora: %s, %d bytes, %s, %.0f ms (%s)", shown, tenant.bytes, what, spent, self.outcomes.words())
        return tenant.path

    def _declined(self, shown: str, reason: str) -> Declined:
        self.outcomes.add(REFUSED)
        reason = BEING_WRITTEN.sub("", reason)
        self.log.warning("bslora: %s is refused: %s (%s)", shown, reason, self.outcomes.words())
        settings = self.tenants.settings
        reason = scrubbed(
            reason, {str(place) for place in (settings.library, settings.cache) if Path(place).is_absolute()}
        )
        return Declined(f"{shown} is refused: {reason}")
