"""vLLM serves a compact library: a request names a tenant, and what is on disk is the compact adapter.

    BSLORA_LIBRARY=./compact vllm serve BASE --enable-lora --max-lora-rank 16        # with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True

    name -> names.py: is it one that a library gives out?      no: 404
         -> library.py: its files, of a directory or a store   can't be had: 400
         -> base.py: is the adapter for this base?             no: 400, the reason is in the log
         -> snapshots.py: a LoRA of the same content, written once, that stays as long as the server lives
         -> vLLM loads that directory, as often as its caches ask for it

vLLM reads a path again whenever the adapter has left its caches, and a path that is gone ends its engine; so nothing that was
handed out is ever removed while a server runs, and what a tenant does to the library can't take the server down.

`plugin.py` is the only file that imports vLLM.
"""
