"""Every field of a PEFT LoRA configuration, and how a conversion treats it: the one list that everything else is read from.

The reader refuses by it, and what the compact and the expanded configuration take over from the source follows from it.
`tests/lora/test_fields.py` holds it against PEFT's own class, so that a field of a newer PEFT is noticed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TREATMENTS = ("carried", "selects", "folded in", "harmless", "refused")


def is_set(value: Any) -> bool:
    """Whether a field says anything: not null, false, zero or empty."""
    return value not in (None, False, 0, "", [], {}, ())


@dataclass(frozen=True, slots=True)
class Field:
    """How a field is treated, and why.

    carried: means the same for the compact and the expanded adapter and is written into both. selects: says which modules are
    adapted; carried where that is still so (`targets.py`). folded in: decides the scaling, which ends up in the factors.
    harmless: says nothing about ΔW. refused: changes what the factors mean; `when` tells the values that do.
    """

    how: str
    why: str
    when: Callable[[Any], bool] = is_set


def _changes_base(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("pissa", "olora", "corda", "loftq"))


FIELDS: dict[str, Field] = {
    # what model it is for
    "task_type": Field("carried", "the class that AutoPeftModel loads"),
    "auto_mapping": Field("carried", "the class that AutoPeftModel loads where there is no task type"),
    "base_model_name_or_path": Field("carried", "the base model"),
    "revision": Field("carried", "the base model's revision"),
    # what stands beside the factors
    "fan_in_fan_out": Field("carried", "the base stores its weights as (in, out)"),
    "modules_to_save": Field("carried", "modules that the file holds whole"),
    "trainable_token_indices": Field("carried", "rows of an embedding that the file holds whole"),
    "ensure_weight_tying": Field("carried", "what is added to an embedding is added to the head that is tied to it"),
    # which modules are adapted
    "target_modules": Field("selects", "names or an expression"),
    "exclude_modules": Field("selects", "names or an expression that are left out"),
    "layers_to_transform": Field("selects", "numbers of layers"),
    "layers_pattern": Field("selects", "what the numbered layers are called"),
    # the scaling
    "peft_type": Field("folded in", "only LORA is read"),
    "r": Field("folded in", "alpha / r"),
    "lora_alpha": Field("folded in", "alpha / r"),
    "use_rslora": Field("folded in", "alpha / √r"),
    "target_parameters": Field("folded in", "the tensors' names and shapes say which experts are adapted (`fused.py`)"),
    "rank_pattern": Field("folded in", "ranks of single modules"),
    "alpha_pattern": Field("folded in", "alphas of single modules"),
    # training time
    "inference_mode": Field("harmless", "whether gradients are taken"),
    "lora_dropout": Field("harmless", "training time"),
    "bias": Field("harmless", "the tensors say whether there are trained biases, see `adapter.py`"),
    "eva_config": Field("harmless", "an initialisation that leaves the base as it is"),
    "lora_ga_config": Field("harmless", "an initialisation; PEFT loads the file as a plain LoRA"),
    "corda_config": Field("harmless", "of use beside init_lora_weights only, which PEFT sets to true as it converts"),
    "loftq_config": Field("harmless", "of use beside init_lora_weights only"),
    "velora_config": Field("harmless", "compresses activations in training"),
    "monteclora_config": Field("harmless", "samples in training"),
    "megatron_core": Field("harmless", "a module's name, of use beside megatron_config only"),
    "qalora_group_size": Field("harmless", "of use beside use_qalora only"),
    "runtime_config": Field("harmless", "is never saved"),
    "peft_version": Field("harmless", "who wrote the file"),
    # what makes the factors mean something else
    "use_dora": Field("refused", "DoRA rescales the base weight, so its update is not B·A"),
    "lora_bias": Field("refused", "lora_bias adds a bias that low-rank factors can't hold"),
    "init_lora_weights": Field(
        "refused", "this initialisation changes the base weights, so B·A is not the update", _changes_base
    ),
    "use_qalora": Field("refused", "QALoRA applies A to pooled inputs"),
    "use_bdlora": Field("refused", "BD-LoRA factors are block-diagonal"),
    "alora_invocation_tokens": Field("refused", "aLoRA is active only after its invocation tokens"),
    "layer_replication": Field("refused", "layer numbers are those of a model with repeated layers"),
    "megatron_config": Field("refused", "Megatron layers are split across devices"),
    "kasa_config": Field("refused", "KaSA truncates the base weights"),
    "arrow_config": Field("refused", "Arrow routes between adapters at run time"),
}

# Fields that are not PEFT's own: of its earlier versions, of trainers and of hubs.
FOREIGN_FIELDS: dict[str, Field] = {
    "library_name": Field("harmless", "the hub's"),
    "parent_library": Field("harmless", "part of auto_mapping in earlier PEFT"),
    "merge_weights": Field("harmless", "earlier PEFT; merging changes no update"),
    "transformers_version": Field("harmless", "who wrote the file"),
    "unsloth_fixed": Field("harmless", "unsloth"),
    "lora_dtype": Field("harmless", "ms-swift; the tensors say what they are stored in"),
    "model_key_mapping": Field("harmless", "ms-swift; the tensors say which modules are adapted"),
    "lorap_lr_ratio": Field("harmless", "ms-swift; a learning rate"),
    "lorap_emb_lr": Field("harmless", "ms-swift; a learning rate"),
    "loraplus_lr_ratio": Field("harmless", "LoRA+; a learning rate"),
    "loraplus_lr_embedding": Field("harmless", "LoRA+; a learning rate"),
    "enable_lora": Field(
        "refused", "factors of a fused QKV layer of PEFT < 0.3 are grouped; merge it into its base with that version"
    ),
    "use_merged_linear": Field(
        "refused", "factors of a fused QKV layer are grouped; merge it into its base with the trainer that wrote it"
    ),
}
KNOWN = FIELDS | FOREIGN_FIELDS

# Words in a field's name that only a trainer's settings have; none of them can change what a file's tensors do.
TRAINING = re.compile(
    r"(^|_)(lr|learning_rate|weight_decay|warmup|epochs?|max_steps|batch_size|optimizer|optim|scheduler|gradient_checkpointing|"
    r"gradient_accumulation|seed|random_state|dataset|max_seq_length|max_seq_len|cutoff_len|wandb|logging|run_name)(_|$)"
)

CARRIED = tuple(name for name, field in FIELDS.items() if field.how == "carried")
SELECTS = tuple(name for name, field in FIELDS.items() if field.how == "selects")
REFUSED = {name: field for name, field in KNOWN.items() if field.how == "refused"}


def inherited(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a converted adapter takes over, those that are set."""
    return {name: raw[name] for name in CARRIED if raw.get(name) is not None}


def is_training(name: str) -> bool:
    """Whether a field that this version does not know is a trainer's setting."""
    return TRAINING.search(name.lower()) is not None
