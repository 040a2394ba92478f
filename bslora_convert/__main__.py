"""The command line's beginning, as `python -m bslora_convert` and as `bslora-convert`."""

from bslora_convert.process.interrupt import INTERRUPTED, exit_now, exit_on_interrupts


def main() -> None:
    """Runs the command line; an interrupt while it is being imported ends as quietly as any other."""
    exit_on_interrupts()
    from bslora_convert.cli import main as run

    try:
        run()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            exit_now()  # threads that are at work would be waited for, and a second Ctrl-C there be a traceback
        raise


if __name__ == "__main__":
    main()
