"""The entry point of group `vllm.general_plugins`: registers the resolver where `BSLORA_LIBRARY` names a library.

vLLM calls it in every process. The one that was started looks at library and cache first, and does not start where tenants could
not be served (`starting.py`). Only vLLM's public interface of resolvers is used, the same since 0.12; a refusal is an
`HTTPException`, which vLLM answers as it is.
"""

import asyncio
import logging
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

from bslora_convert.errors import BsloraConvertError
from bslora_convert.files.scrub import scrubbed
from bslora_convert.vllm.resolver import Declined, Resolver
from bslora_convert.vllm.settings import PLANS, Settings, is_strict
from bslora_convert.vllm.starting import check, warm_up
from bslora_convert.vllm.tenants import Tenants
from bslora_convert.vllm.worker import install, unfit

NAME = "bslora-convert"
DECODERS = 2  # adapters that are decoded at a time
LOGGER = "vllm.bslora_convert"  # below vLLM's own, whose handler writes it
BAD_REQUEST = 400


def register() -> None:
    """Registers the resolver; without `BSLORA_LIBRARY` it does nothing.

    :raises SystemExit: when library, cache or settings can't be used, and `BSLORA_STRICT` is not 0; the log has the reason.
    """
    log = logging.getLogger(LOGGER)
    first = multiprocessing.parent_process() is None
    settings, why = None, None
    try:
        settings = Settings.of(command=sys.argv)
        if settings is not None and first:
            for words in check(settings):
                log.warning("bslora: %s", words)
    except (BsloraConvertError, OSError) as error:
        why = str(error)
        if is_strict():
            log.error("bslora: %s; the server does not start (BSLORA_STRICT=0: it starts, and refuses tenants)", why)
            raise SystemExit(1) from None
        log.error("bslora: %s; tenants are refused", why)
    if settings is None and why is None:
        return
    from fastapi import HTTPException
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if settings is not None and settings.plan != PLANS[0]:
        settings = _with_workers(settings, log)
    if (
        first
    ):  # no worker: vLLM's for CPUs looks into every module that is loaded when it starts, and stops at llvmlite's
        warm_up()

    @cache
    def opened() -> Resolver:
        if settings is None:
            raise Declined(scrubbed(f"the server's settings are wrong: {why}"))
        return Resolver(Tenants(settings), log)

    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix=NAME)

    class BsloraResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is in an environment of its own
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            try:
                loop = asyncio.get_running_loop()
                path = await loop.run_in_executor(pool, lambda: opened().answer(lora_name, base_model_name))
            except Declined as error:
                raise HTTPException(BAD_REQUEST, str(error)) from None
            except Exception:  # the cache can't be opened
                log.exception("bslora: %r can't be resolved", lora_name)
                raise HTTPException(BAD_REQUEST, "the server can't read its tenants; its log says why") from None
            # The server gives the request a number of its own.
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    LoRAResolverRegistry.register_resolver(NAME, BsloraResolver())


def _with_workers(settings: Settings, log: logging.Logger) -> Settings:
    """Has the workers decode, or falls back to LoRAs that are written where this vLLM is not as it is known."""
    try:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
    except ImportError as error:
        why: str | None = str(error)
    else:
        why = unfit(PEFTHelper, LoRAModel)
        if why is None:
            install(PEFTHelper, LoRAModel)
            return settings
    log.warning("bslora: BSLORA_PLAN=%s needs another vLLM (%s); LoRAs are written instead", settings.plan, why)
    return replace(settings, plan=PLANS[0])
