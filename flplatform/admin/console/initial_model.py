"""Builds a job's initial model in a process of its own: the job's code never runs in the console.

    python -m flplatform.admin.console.initial_model < request.json

The request names the job's code folder, the function (`module:name`), its two arguments and the
file to make. The function is called as `function(args, seed)` and returns named NumPy arrays.
"""

import importlib
import json
import sys
from pathlib import Path

from flplatform.core.errors import InvalidArgumentError
from flplatform.files.modelfile import check_finite, save


def build(code: Path, function: str, args: dict[str, object], seed: int, target: Path) -> None:
    """Call a job's function and write what it returns.

    Raises:
        FLError: what it returns is not a model.
        Exception: whatever the job's code raises.
    """
    module, _, name = function.partition(":")
    sys.path.insert(0, str(code))
    arrays = getattr(importlib.import_module(module), name)(args, seed)
    if not isinstance(arrays, dict):
        raise InvalidArgumentError(
            f"returned a {type(arrays).__name__}, not a dict of arrays", field=function
        )
    check_finite(arrays, "initial model")
    save(target, arrays)


def main() -> None:
    """Read the request from standard input."""
    request = json.load(sys.stdin)
    build(
        Path(request["code"]),
        request["function"],
        request["args"],
        request["seed"],
        Path(request["target"]),
    )


if __name__ == "__main__":
    main()
