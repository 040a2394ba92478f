"""`python -m bslora_convert` is the command line."""

from bslora_convert.cli import main

if __name__ == "__main__":
    main()
