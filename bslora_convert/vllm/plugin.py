"""The entry point of group `vllm.general_plugins`: registers the resolver where `BSLORA_LIBRARY` names a library.

vLLM calls it in every process; the library and its cache are opened when the first name is asked for, which only the API server
does. Only vLLM's public interface of resolvers is used, the same since 0.12.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

from bslora_convert.errors import BsloraConvertError
from bslora_convert.vllm.resolver import Resolver
from bslora_convert.vllm.settings import PLANS, Settings
from bslora_convert.vllm.tenants import Tenants
from bslora_convert.vllm.worker import install, unfit

NAME = "bslora-convert"
DECODERS = 2  # adapters that are decoded at a time
LOGGER = "vllm.bslora_convert"  # below vLLM's own, whose handler writes it


def register() -> None:
    """Registers the resolver; without `BSLORA_LIBRARY` it does nothing. Wrong settings are logged, and nothing is served."""
    log = logging.getLogger(LOGGER)
    try:
        settings = Settings.of()
    except BsloraConvertError as error:
        log.error("bslora: %s; no tenant is served", error)
        return
    if settings is None:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if settings.plan != PLANS[0]:
        settings = _with_workers(settings, log)

    @cache
    def opened() -> Resolver:
        return Resolver(Tenants(settings), log)

    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix=NAME)

    class BsloraResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is in an environment of its own
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            try:
                loop = asyncio.get_running_loop()
                path = await loop.run_in_executor(pool, lambda: opened().answer(lora_name, base_model_name))
            except Exception:  # the cache can't be opened
                log.exception("bslora: %r can't be resolved", lora_name)
                return None
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
