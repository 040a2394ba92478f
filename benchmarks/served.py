"""What tenants of a compact library cost a vLLM server beside plain LoRAs: time to the first token, and memory of the host.

    make serve-test                                       # once: makes build/vllm
    python benchmarks/served.py fixtures/smollm2-135m-math-r16 --base-model build/base --python build/vllm/bin/python

One adapter at an eighth of its bytes becomes N tenants, each with scales of its own. Three servers one after another, alike but
for what they are given: LoRA directories by `/v1/load_lora_adapter`, the plugin writing LoRAs, the plugin's workers decoding.
The first two keep every tenant in the CPU cache, the third only as many as there are slots, for it decodes again from 1 MB.

cold: the first request of a tenant (with the loading of a directory), one token. again: after all others were asked for.
memory: growth of all processes of the server from the fourth tenant to the last, for each; and what it reads from again.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, expand

sys.path.append(str(Path(__file__).parents[1]))  # the server is started as the tests start it
from tests.vllm.serving import Server, serving

MB = 1e6
SETTLED = 4  # tenants after which memory is first looked at
PROMPT = list(range(5, 25))
SLOTS = "4"


def tenants(compact: Path, place: Path, count: int) -> list[str]:
    """Copies of a compact adapter in codes, their scales multiplied."""
    names = [f"t{number:03d}" for number in range(count)]
    tensors = load_file(compact / "adapter_model.safetensors")
    (key,) = [key for key in tensors if key.endswith("bslora_scales")]
    for number, name in enumerate(names):
        (place / name).mkdir(parents=True)
        shutil.copyfile(compact / "adapter_config.json", place / name / "adapter_config.json")
        scaled = tensors | {key: tensors[key] * (0.5 + number / count)}
        save_file(scaled, place / name / "adapter_model.safetensors", metadata={"format": "pt"})
    return names


def measured(
    server: Server, names: list[str], plain: Path | None
) -> tuple[list[float], list[float], list[float], float]:
    """(Seconds of requests for the base, of each tenant's first, of each one's second, bytes a tenant)."""
    base = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
    bare = [server.ask(base, PROMPT, 1).seconds for _ in range(6)][1:]
    cold, at_first = [], 0
    for number, name in enumerate(names):
        loading = 0.0
        if plain is not None:
            began = time.perf_counter()
            status, said = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(plain / name)})
            loading = time.perf_counter() - began
            assert status == 200, said
        answer = server.ask(name, PROMPT, 1)
        assert answer.status == 200, answer
        cold.append(loading + answer.seconds)
        if number + 1 == SETTLED:
            at_first = server.memory()
    grown = (server.memory() - at_first) / (len(names) - SETTLED)
    again = [server.ask(name, PROMPT, 1).seconds for name in names]
    return bare, cold, again, grown


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--tenants", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    table = Table(
        "given", "base, ms", "cold, ms", "again, ms", "RSS a tenant, MB", "read again, MB", "tenants a GiB",
        title=f"{arguments.tenants} tenants, {arguments.dtype}, medians",
    )  # fmt: skip
    base = arguments.base_model.resolve()
    with tempfile.TemporaryDirectory() as room:
        here = Path(room)
        compress(arguments.lora, here / "compact", Recipe(transform="none", bytes=0.125))
        names = tenants(here / "compact", here / "library", arguments.tenants)
        for name in names:
            expand(here / "library" / name, here / "plain" / name, engine="vllm", base_model=str(base))
        every, few = str(arguments.tenants), SLOTS
        for given, plan, kept in (
            ("LoRA directories", None, every),
            ("plugin, LoRAs", "lora", every),
            ("plugin, compact", "compact", few),
        ):
            place = here / given.replace(" ", "-")
            place.mkdir()
            environment = {"BSLORA_BASE_ALIASES": "*"}
            if plan:
                environment |= {
                    "BSLORA_LIBRARY": str(here / "library"),
                    "BSLORA_CACHE": str(place / "cache"),
                    "BSLORA_PLAN": plan,
                }
            flags = ("--dtype", arguments.dtype, "--max-loras", SLOTS, "--max-cpu-loras", kept)
            with serving(arguments.python, base, place, environment, *flags) as server:
                bare, cold, again, grown = measured(server, names, None if plan else here / "plain")
            source = here / ("plain" if plan != "compact" else "library") / names[0]
            read = sum(path.stat().st_size for path in source.iterdir() if path.suffix in (".safetensors",))
            whole = max(grown, 0) + (read if plan == "compact" else 0)
            middle = (f"{1000 * statistics.median(times):.0f}" for times in (bare, cold, again))
            bytes_ = (f"{size / MB:.2f}" for size in (grown, read))
            table.add_row(given, *middle, *bytes_, f"{(1 << 30) / whole:,.0f}")
            Console().print(table)


if __name__ == "__main__":
    main()
