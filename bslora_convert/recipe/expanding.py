"""What `expand` is asked for."""

from dataclasses import dataclass

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, is_whole
from bslora_convert.recipe.options import FORM, OUTPUT, accept_changed_option, option
from bslora_convert.recipe.storage import DTYPES as FLOATS
from bslora_convert.serving.engines import ENGINES, Engine

FORMATS = ("lora", "gguf", "mlx", "official")
SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
DTYPES = (*FLOATS, *SHORT, "q8_0")
UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class ExpandOptions:
    """Which file to write, and how.

    rank: a number re-truncates every module that has more; "uniform" fills every module up to the largest rank.

    base_model: replaces `base_model_name_or_path`; for gguf the directory of the base's `config.json`, which is read.
    dtype: storage, auto = the compact adapter's; q8_0 in gguf only. format: of `FORMATS`; None is the engine's, else lora.
    engine: of `ENGINES`, who is to load it. accept_changed: as for `load_compact`.

    :raises RecipeError: naming the field, its value and what is allowed, or two that exclude each other.
    """

    engine: str | None = option(
        None, "Write what this engine loads correctly: format, ranks, missing layers, names; or say why there is no such file.",
        FORM, choices=tuple(ENGINES), flag="--for",
    )  # fmt: skip
    format: str | None = option(
        None, "Write this format: gguf for llama.cpp, mlx for MLX-LM, official for the BSLoRA authors' code.", FORM,
        choices=FORMATS, usual="the engine's, else lora",
    )  # fmt: skip
    rank: int | str | None = option(
        None, "Re-truncate to at most N, or fill every module up to the largest rank.", FORM, metavar="N|uniform"
    )
    base_model: str | None = option(
        None, "Name this base model in the file, as some servers compare it letter by letter; for gguf, its directory.", FORM,
        metavar="NAME_OR_DIR",
    )  # fmt: skip
    dtype: str = option("auto", "Store numbers in this type; auto = the compact adapter's.", FORM, choices=DTYPES)
    accept_changed: bool = accept_changed_option()
    overwrite: bool = option(False, "Replace an earlier result in OUT_DIR.", OUTPUT)

    def __post_init__(self) -> None:
        if self.rank not in (None, UNIFORM) and not (is_whole(self.rank) and self.rank > 0):
            raise RecipeError(f"rank is {self.rank!r}: a positive whole number or {UNIFORM} is allowed", "rank")
        check_choice("dtype", self.dtype, DTYPES)
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
        if self.engine is not None:
            check_choice("engine", self.engine, ENGINES)
            expected = ENGINES[self.engine].format
            if self.format not in (None, expected):
                raise RecipeError(
                    f"engine is {self.engine}, which reads format {expected}, not {self.format}; leave one of both out",
                    "engine",
                    "format",
                )
        if self.dtype == "q8_0" and self.layout != "gguf":
            raise RecipeError(f"dtype is 'q8_0': only format gguf has it, not {self.layout}", "dtype", "format")
        if self.rank is not None and self.layout == "official":
            raise RecipeError(
                f"rank is {self.rank!r}: only a LoRA can be re-truncated or padded; leave it out or use format lora",
                "rank",
                "format",
            )
        if self.layout == "gguf" and self.base_model is None:
            raise RecipeError(
                "format gguf needs base_model: the directory of the base model, whose config.json says how llama.cpp names "
                "and orders its weights",
                "format",
                "base_model",
            )

    @property
    def layout(self) -> str:
        """One of `FORMATS`."""
        return self.format or (ENGINES[self.engine].format if self.engine else "lora")

    @property
    def reader(self) -> Engine | None:
        """Who is to load it; gguf and mlx are read by one engine each."""
        if self.engine is not None:
            return ENGINES[self.engine]
        return next((e for e in ENGINES.values() if e.format == self.layout != "lora"), None)

    def stored(self, own: str) -> str:
        """The dtype's full name; own: the compact adapter's."""
        return own if self.dtype == "auto" else SHORT.get(self.dtype, self.dtype)
