"""Whether a base model can be had, and how large it is, told before anything heavy is imported or computed."""

import os
from pathlib import Path

from bslora_convert.errors import InputError, reason_of
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.jsonfile import read_json

CONFIG_NAME = "config.json"
WEIGHTS = (".safetensors", ".bin")
SECONDS = 5.0  # that the hub has to answer
MOST_LAYERS = 1 << 12  # that a configuration is believed to have


def check_base(name: str | Path) -> None:
    """Refuses a base model that is no directory of one, not in the hub's cache, and not on the hub.

    :raises InputError: naming it. :raises RecipeError: when the packages that run one are not installed.
    """
    need("base", "base_model", "base_model")
    place = Path(name)
    if place.is_dir():
        if not (place / CONFIG_NAME).is_file():
            raise InputError(f"{name}: no {CONFIG_NAME}; the directory of a transformers model is expected")
        return
    if place.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1 or place.exists():
        raise InputError(f"base model {name}: no such directory")
    _check_hub(str(name))


def base_directory(name: str | Path) -> Path:
    """The directory of a base model's files, fetched into the hub's cache where it has a hub name.

    :raises InputError: when it can't be had.
    """
    place = Path(name)
    return place if place.is_dir() else resolve(f"hf://{name}")


def base_bytes(name: str | Path | None) -> int:
    """Bytes of a base model's weight files, as far as they are here: in a directory or in the hub's cache."""
    if name is None:
        return 0
    place = Path(name)
    if not place.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(str(name), CONFIG_NAME)
        except HFValidationError:
            return 0
        if not isinstance(config, str):
            return 0
        place = Path(config).parent
    sizes = {suffix: sum(file.stat().st_size for file in place.glob(f"*{suffix}")) for suffix in WEIGHTS}
    return sizes[".safetensors"] or sizes[".bin"]  # one of both is read


def base_layers(name: str | Path | None) -> int | None:
    """How many layers a base model has, by the `config.json` of its directory; None where it is none, or does not say.

    :raises InputError: when that file is damaged.
    """
    path = Path(name or "") / CONFIG_NAME
    if name is None or not path.is_file():
        return None
    config = read_json(path)
    inner = config.get("text_config")
    count = (inner if isinstance(inner, dict) else config).get("num_hidden_layers")
    return count if type(count) is int and 0 < count <= MOST_LAYERS else None


def _check_hub(name: str) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
            return
        HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(name, timeout=SECONDS)
    except (GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        what = (
            "needs a login with access"
            if isinstance(error, GatedRepoError)
            else "no directory, and no model of the hub"
        )
        raise InputError(f"base model {name}: {what}") from None
    except Exception as error:  # what the hub's client raises of the network has no common base
        raise InputError(
            f"base model {name}: no directory here and not in the hub's cache, and the hub can't be reached ({reason_of(error)})"
        ) from None
