"""Help of the verbs that take a whole recipe: options under what they are for."""

import click

from bslora_convert.recipe.aim import AIMS

SECTIONS: dict[str, tuple[str, ...]] = {
    "What the result must reach (one of these)": AIMS,
    "The form": ("transform", "min_shared", "shared_size", "slice", "kernel", "local_ranks", "groups", "max_rank"),
    "Evidence": ("base_model", "prompts", "metric"),
    "Distillation": (
        "finetune", "train", "max_steps", "epochs", "max_minutes", "learning_rate", "batch_size", "accumulate", "temperature",
        "hidden_weight", "max_length", "evaluate_every", "patience",
    ),
    "Storage": ("bits", "dtype", "gain"),
    "The library": (
        "shard", "engine", "workers", "resume", "retry_failed", "fail_fast", "max_failures", "dry_run",
    ),
}  # fmt: skip
REST = "Running"


class Sectioned(click.Command):
    """A command whose help groups its options; those of no section come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each group that has options here."""
        rows = {param.name: row for param in self.get_params(ctx) if (row := param.get_help_record(ctx)) is not None}
        for title, names in SECTIONS.items():
            own = [rows.pop(name) for name in names if name in rows]
            if own:
                with formatter.section(title):
                    formatter.write_dl(own)
        with formatter.section(REST):
            formatter.write_dl(list(rows.values()))
