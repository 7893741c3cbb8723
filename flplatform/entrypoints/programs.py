"""`flplatform PROGRAM …`: the programs under one name; `flplatform state` is `fl_state`."""

import sys
from importlib import import_module

PROGRAMS = ("server", "client", "admin", "state")


def main() -> None:
    """Run the program that is named first on the command line."""
    program, *words = sys.argv[1:] or [""]
    if program not in PROGRAMS:
        print(f"usage: flplatform {'|'.join(PROGRAMS)} …", file=sys.stderr)
        sys.exit(0 if program in ("-h", "--help") else 2)
    sys.argv = [f"fl_{program}", *words]
    import_module(f"flplatform.entrypoints.{program}").main()


if __name__ == "__main__":
    main()
