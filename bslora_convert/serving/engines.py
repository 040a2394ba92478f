"""What each engine asks of an adapter's file. docs/serving.md says how every entry was checked, and at which version.

An engine multiplies B·A by what it finds in the configuration: vLLM, SGLang, LoRAX and TGI by alpha / r, TensorRT-LLM and
llama.cpp by alpha / (the tensor's own rank), MLX-LM by `scale`. With equal ranks and alpha = r all of these are one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bslora_convert.layers.slots import STEPS

# What LoRAX and TGI fill a rank up to. From the second kind of module on they divide by the filled up rank, so a file has to
# have it to be scaled right.
SGMV_RANKS = (8, *range(16, 513, 16))
# TensorRT-LLM's default table of modules; a name that is not in it stops the loading.
TRTLLM_MODULES = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
)


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine reads.

    format: of the file. one_rank: every tensor has to have the rank that the configuration says. filled: ranks that it takes as
    they are, any where empty. slots: steps of the rank that a slot is reserved for, empty where it is the rank itself, None
    where the engine has no slots. every_layer: a kind of module that some layer lacks is dropped in all of them, silently.
    kinds: of modules, as the form has them. experts: whether one module an expert is read, and experts that PEFT has fused.
    modules: last parts of the names that it knows, any where empty. heads: modules of which it loads one whole. ignored: last
    parts of names that it loads and never applies, with the reason. towers: what makes it apply updates of a vision or audio
    tower. fused: what it needs where it does not fuse its experts. left: files that must not lie beside the adapter.
    """

    title: str
    format: str = "lora"
    one_rank: bool = False
    filled: tuple[int, ...] = ()
    slots: tuple[int, ...] | None = ()
    every_layer: bool = False
    kinds: frozenset[str] = frozenset({"linear"})
    experts: bool = False
    modules: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()
    ignored: Mapping[str, str] = field(default_factory=dict)
    towers: str = ""
    fused: str = ""
    left: tuple[str, ...] = ()

    def rank(self, largest: int) -> int | None:
        """The rank that a file of this largest rank is written with; None where the engine takes none so large."""
        steps = self.filled or self.slots or (largest,)
        if largest > steps[-1]:
            return None
        return next(step for step in steps if step >= largest) if self.filled else largest

    def slot(self, rank: int) -> int | None:
        """The rank that a slot is reserved for; None without slots."""
        if self.slots is None:
            return None
        return next((step for step in self.slots if step >= rank), None) if self.slots else rank


ENGINES: dict[str, Engine] = {
    "vllm": Engine(  # read in 0.32.0: lora/lora_model.py, model_manager.py, config/lora.py; MLA: issue 48974
        "vLLM",
        slots=STEPS,
        kinds=frozenset({"linear", "embedding"}),
        experts=True,
        heads=frozenset({"score", "classifier"}),
        ignored={"kv_b_proj": "its latent attention (MLA) reads that weight past the adapter"},
        towers="--enable-tower-connector-lora",
        fused='--enable-mixed-moe-lora-format and "is_3d_lora_weight": true where the adapter is loaded',
    ),
    "sglang": Engine("SGLang", one_rank=True, left=("added_tokens.json",)),
    "lorax": Engine("LoRAX", one_rank=True, filled=SGMV_RANKS, every_layer=True),
    "tgi": Engine("TGI", one_rank=True, filled=SGMV_RANKS, every_layer=True),
    "trtllm": Engine("TensorRT-LLM", one_rank=True, modules=TRTLLM_MODULES),
    "llama.cpp": Engine("llama.cpp", format="gguf", slots=None),
    "mlx": Engine("MLX-LM", format="mlx", slots=None, one_rank=True),
}
