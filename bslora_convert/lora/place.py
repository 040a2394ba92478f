"""Where an adapter's two files are; and what a directory or file holds that is no PEFT adapter, by its own name."""

from collections.abc import Collection
from pathlib import Path

from bslora_convert.errors import BsloraConvertError, InputError, Refused
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import read_headers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
SHARDS = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json")
SHARD = "adapter_model-*-of-*"
MLX_WEIGHTS = "adapters.safetensors"
GGUF = "a GGUF file; give the PEFT adapter that it was made from"

# file -> what it is, and what to do: formats whose files have names of their own
FILES = {
    "pytorch_lora_weights.safetensors": "a diffusers LoRA, which has no scaling of PEFT's; load it in its pipeline and save it "
    "with PEFT's save_pretrained",
    "pytorch_adapter.bin": "an adapter of the AdapterHub library (`adapters`), which is no PEFT LoRA",
    "adapter.safetensors": "not named as PEFT names its weights; rename it to adapter_model.safetensors if PEFT wrote it",
    "model.safetensors.index.json": "a whole model, not an adapter; extract a LoRA of it first (mergekit-extract-lora)",
    "model.safetensors": "a whole model, not an adapter; extract a LoRA of it first (mergekit-extract-lora)",
    "pytorch_model.bin": "a whole model, not an adapter; extract a LoRA of it first (mergekit-extract-lora)",
}

# start or end of a key -> what it is: formats that are known by their keys only
KOHYA = "a kohya / sd-scripts LoRA (one file, an alpha a module); load it with diffusers and save it with PEFT's save_pretrained"
KEYS = {
    "lora_unet_": KOHYA,
    "lora_te": KOHYA,
    "lora_transformer_": KOHYA,
    ".lora_down.weight": "a LoRA with lora_down and lora_up (sd-scripts), with alphas in the file; convert it to PEFT's format",
    ".hada_w1_a": "a LyCORIS LoHa, whose update is no product B·A",
    ".lokr_w1": "a LyCORIS LoKr, whose update is no product B·A",
    ".lora_a": "an MLX adapter (factors transposed, one scale); convert it to PEFT's format",
}


def locate(path: Path) -> tuple[Path, Path]:
    """Finds (directory of the configuration, weight file).

    path: an adapter directory, a weight file, or a directory whose only adapter stands in a sub-folder, as PEFT writes
    adapters that have a name.

    :raises InputError: when there is none, or more than one.
    :raises Refused: when it is an adapter of another format, or in shards; the message names it.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        return _of_file(path)
    if not (path / CONFIG_NAME).exists():
        named = sorted(child.parent for child in path.glob(f"*/{CONFIG_NAME}"))
        if len(named) == 1:
            return locate(named[0])
        if named:
            raise InputError(f"{path}: several adapters, name one of {', '.join(str(child) for child in named)}")
        refuse_other_formats(path)
        raise InputError(f"{path}: no {CONFIG_NAME}; a PEFT adapter directory is expected")
    for name in WEIGHTS_NAMES:
        if (path / name).exists():
            return path, path / name
    refuse_other_formats(path)
    raise InputError(f"{path}: no weights, one of {', '.join(WEIGHTS_NAMES)} is expected")


def refuse_other_formats(directory: Path) -> None:
    """Says what a directory without a PEFT adapter's files holds, where that is known.

    :raises Refused: naming the file, what it is and what to do.
    """
    if (directory / MLX_WEIGHTS).exists() or _says(directory / CONFIG_NAME, "lora_parameters"):
        raise Refused(
            f"{directory}: an MLX adapter (factors transposed, one scale in lora_parameters); convert it to PEFT's format first"
        )
    shards = sorted({*directory.glob(SHARD), *(directory / name for name in SHARDS if (directory / name).exists())})
    if shards:
        raise Refused(
            f"{shards[0]}: an adapter in several files, which PEFT does not load either; put their tensors into one "
            f"{WEIGHTS_NAMES[0]} first (safetensors.torch.load_file and save_file)"
        )
    for name, what in FILES.items():
        if (directory / name).is_file():
            raise Refused(f"{directory / name}: {what}")
    for file in sorted(directory.glob("*.gguf")):
        raise Refused(f"{file}: {GGUF}")
    for file in sorted(directory.glob("*.safetensors"))[:1]:
        refuse_by_keys(file, _keys(file))


def refuse_by_keys(file: Path, keys: Collection[str]) -> None:
    """Says what a tensor file is whose keys are another format's.

    :raises Refused: naming the file, a key, what it is and what to do.
    """
    for mark, what in KEYS.items():
        found = next(
            (key for key in keys if key.startswith(mark) or (mark.startswith(".") and key.endswith(mark))), None
        )
        if found is not None:
            raise Refused(f"{file}: tensor {found}: {what}")


def _of_file(path: Path) -> tuple[Path, Path]:
    if path.name == CONFIG_NAME:
        return locate(path.parent)
    if path.suffix == ".gguf":
        raise Refused(f"{path}: {GGUF}")
    if path.match(SHARD) or path.name in (*SHARDS, MLX_WEIGHTS):
        refuse_other_formats(path.parent)
    if not (path.parent / CONFIG_NAME).is_file():
        refuse_by_keys(path, _keys(path))
        raise InputError(
            f"{path}: no {CONFIG_NAME} beside it; the scaling (lora_alpha, r, use_rslora) can't be known without it"
        )
    return path.parent, path


def _keys(file: Path) -> Collection[str]:
    """A safetensors file's keys; none where it can't be read, of which whoever reads it complains."""
    try:
        return read_headers(file) if file.suffix == ".safetensors" else ()
    except BsloraConvertError:
        return ()


def _says(path: Path, field: str) -> bool:
    try:
        return path.is_file() and field in read_json(path)
    except BsloraConvertError:
        return False
