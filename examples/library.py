# %% [markdown]
# # From a folder of LoRAs to a served library
#
# Two teams have trained a LoRA each on the same base model. Here both become compact adapters, what was kept is
# measured on prompts that they know, and a server answers for either of them by name. Everything runs on the fixtures
# of this repository in under a minute, without a download: `make test` installs what is needed, then
#
#     python examples/library.py
#
# or open `examples/library.ipynb`, which is this script with what it printed. The base model is tiny and was trained
# on Shakespeare, so don't expect sense of it; what counts is what the adapters change.

# %%
import http.client
import json
import os
import runpy
import shutil
from pathlib import Path

import xllamacpp

from bslora_convert import Recipe, batch, expand_library, verify_library

os.chdir(next(place for place in (Path.cwd(), *Path.cwd().parents) if (place / "fixtures").is_dir()))
adapters = Path("fixtures/tiny")  # gsm8k/ and banking77/ are LoRAs, base/ is the model that they were trained on
base = adapters / "base"
out = Path("build/example")
shutil.rmtree(out, ignore_errors=True)

print(*(path.parent for path in sorted(adapters.glob("*/adapter_model.safetensors"))), sep="\n")

# %% [markdown]
# ## 1. Compress the folder
#
# Every adapter below the folder is found and converted to a quarter of its bytes. In a shell:
#
#     bslora-convert batch fixtures/tiny build/example/compact --transform none --bytes 0.25
#
# The same call again goes on where an interrupted one stopped; `build/example/compact/report.html` is the page to
# look at.

# %%
summary = batch(str(adapters), out / "compact", Recipe(transform="none", bytes=0.25), workers=0)

print(f"{summary['ok']} of {summary['items']} adapters converted")
print(f"{summary['bytes_before']:,} bytes to {summary['bytes_after']:,}")
print(f"relative error of the weights, at most: {summary['relative_error']['max']:.3f}")

# %% [markdown]
# ## 2. Verify it
#
# An error of the weights says little about answers. So the base model runs each adapter beside the LoRA that it came
# from, on prompts of both tenants that neither was trained on: the retention is the share of what the LoRA changes in
# the model's predictions that is still there. An adapter below the threshold would make the exit code 1. Greedy texts
# part for good at the first close call, so they say less than they seem to.
#
#     bslora-convert verify build/example/compact --base-model fixtures/tiny/base --prompts build/example/prompts.jsonl \
#         --max-new-tokens 16 --min-retention 0.95 --save

# %%
names = ("banking77", "gsm8k")
held_out = {name: (adapters / f"{name}-heldout.jsonl").read_text(encoding="utf-8").splitlines() for name in names}
prompts = out / "prompts.jsonl"
prompts.write_text("\n".join(line for lines in held_out.values() for line in lines[:8]), encoding="utf-8")

measured = verify_library(
    out / "compact", base_model=base, prompts=prompts, max_new_tokens=16, min_retention=0.95, save=True
)

for row in measured["rows"]:
    print(f"{row['id']}: retention {row['retention']:.1%}, KL {row['kl']:.4f}, same next token {row['agreement']:.1%}")
    print(
        f"    of {row['generation']['rows']} greedy texts {row['generation']['exact_match']:.0%} the same to the last letter"
    )
assert measured["passed"]

# %% [markdown]
# ## 3. Expand it for the server
#
# `--for` names the engine: each reads an adapter in its own way, and some scale one wrongly without saying so.
# llama.cpp takes GGUF.
#
#     bslora-convert expand build/example/compact build/example/served --for llama.cpp --base-model fixtures/tiny/base --dtype f16

# %%
served = expand_library(out / "compact", out / "served", engine="llama.cpp", base_model=str(base), dtype="f16")

for row in served["rows"]:
    print(f"{row['id']}: {row['bytes']:,} bytes, ranks {row['ranks']['min']} to {row['ranks']['max']}")

# %% [markdown]
# ## 4. Serve it
#
# llama.cpp wants the base model as GGUF too: of a real one llama.cpp's own `convert_hf_to_gguf.py` makes it, of the
# tiny one a script of the fixtures does. The package `xllamacpp` is llama.cpp's server within Python; on a machine of
# yours the same server is
#
#     llama-server -m base.gguf --lora banking77/adapter.gguf --lora gsm8k/adapter.gguf

# %%
model = out / "base.gguf"
runpy.run_path("fixtures/make_gguf.py")["make"](base, model)

settings = xllamacpp.CommonParams()
settings.model.path = str(model)
settings.port = 0  # a free one
settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.lora_adapters = [
    xllamacpp.CommonAdapterLoraInfo(str(out / "served" / name / "adapter.gguf"), 0.0) for name in names
]
server = xllamacpp.Server(settings)


def ask(prompt: str, tenant: str | None = None) -> str:
    """The server's answer by a tenant's adapter, or by the bare base model."""
    asked = {"prompt": prompt, "n_predict": 16, "temperature": 0}
    scales = [{"id": number, "scale": float(name == tenant)} for number, name in enumerate(names)]
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))
    connection.request("POST", "/completion", json.dumps({**asked, "lora": scales}))
    answer = json.load(connection.getresponse())
    connection.close()
    return str(answer["content"])


# %% [markdown]
# One server, one base model in memory, and the request says whose adapter answers:

# %%
message, problem = (json.loads(held_out[name][0])["prompt"] for name in names)

print(message, end="\n\n")
for tenant in (None, *names):
    print(f"{tenant or 'base model'}: {ask(message, tenant)!r}")

# %% [markdown]
# The tiny model is too small to get a customer's intent right, but with its adapter it speaks of the bank's intents
# and of nothing else. Of the answers to 32 messages, those that name one of the intents that occur in the file:

# %%
rows = [json.loads(line) for line in held_out["banking77"]]
intents = {row["completion"] for row in rows}
for tenant in (None, "banking77"):
    known = sum(ask(row["prompt"], tenant) in intents for row in rows[:32])
    print(f"{tenant or 'base model'}: {known} of 32")

# %% [markdown]
# ## Where to go from here
#
# vLLM serves the compact library as it lies, by the tenant's name, without anything being expanded, and every other
# engine has its own `--for`: [serving](../docs/serving.md). Manifests and shards:
# [libraries](../docs/library.md). The smallest file that provably behaves the same:
# [distillation](../docs/distillation.md).
