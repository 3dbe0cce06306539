"""`python -m pellucid`: the command line, where no script is on the path."""

from .cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main(prog_name="pellucid")
