"""Generate the checked-in protobuf code, or with `--check` compare it with a fresh generation.

The generator lives in a throw-away virtual environment of its own: its pinned release needs an
older protobuf runtime than the platform may run on.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = Path("flplatform/rpc/v1/federated.proto")
GENERATED = ("federated_pb2.py", "federated_pb2.pyi", "federated_pb2_grpc.py")


def generate(out: Path) -> None:
    """Generate all code below `out`."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        requirements = ROOT / "requirements-protos.txt"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-r", requirements], check=True)
        outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
        subprocess.run(
            [python, "-m", "grpc_tools.protoc", "-I.", *outputs, str(PROTO)], cwd=ROOT, check=True
        )


def main() -> int:
    """Generate in place, or compare; return the exit status."""
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / PROTO.parent
        stale = [
            name
            for name in GENERATED
            if (fresh / name).read_bytes() != (ROOT / PROTO.parent / name).read_bytes()
        ]
    if stale:
        print(f"not what {PROTO} generates: {', '.join(stale)}; run: make protos", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
