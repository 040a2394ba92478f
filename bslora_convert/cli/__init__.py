"""The command line: one file a verb, parsing and printing only. Nothing heavy is imported before a verb runs."""

import click

from bslora_convert.cli.analyze import analyze
from bslora_convert.cli.batch import batch, capacity
from bslora_convert.cli.compare import compare
from bslora_convert.cli.compress import compress
from bslora_convert.cli.expand import expand
from bslora_convert.cli.finetune import finetune
from bslora_convert.cli.inspect import inspect
from bslora_convert.cli.push import push
from bslora_convert.cli.recipe import recipe
from bslora_convert.cli.verify import verify
from bslora_convert.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bslora-convert")
def main() -> None:
    """Converts LoRA adapters that already exist into compact BSLoRA form, and proves what was kept.

    \b
    Start here:
      bslora-convert inspect  LORA_DIR
      bslora-convert analyze  LORA_DIR --out ANALYSIS_DIR
      bslora-convert compress LORA_DIR OUT_DIR
      bslora-convert compare  LORA_DIR --budgets 0.25
      bslora-convert batch    LIBRARY  OUT --workers 4
      bslora-convert expand   OUT_DIR  NEW_LORA_DIR
      bslora-convert verify   OUT_DIR  --base-model BASE --prompts PROMPTS.jsonl
      bslora-convert finetune OUT_DIR  TUNED_DIR --reference LORA_DIR --base-model BASE --prompts PROMPTS.jsonl
      bslora-convert capacity OUT      --gpu-gib 80 --base-gib 20
      bslora-convert push     OUT_DIR  ORG/NAME
      bslora-convert recipe > recipe.toml
    """


for verb in (analyze, batch, capacity, compare, compress, expand, finetune, inspect, push, recipe, verify):
    main.add_command(verb)
