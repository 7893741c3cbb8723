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
REQUIREMENTS = ROOT / "requirements-protos.txt"
GENERATED = ("federated_pb2.py", "federated_pb2.pyi", "federated_pb2_grpc.py")


def install(folder: Path) -> Path:
    """Install the pinned generator into a new virtual environment; return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
    return python


def generate(python: Path, out: Path) -> None:
    """Generate all code below `out`."""
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
    subprocess.run(
        [python, "-m", "grpc_tools.protoc", "-I.", *outputs, str(PROTO)], cwd=ROOT, check=True
    )


def stale(python: Path) -> list[str]:
    """Return the checked-in files that a fresh generation would change."""
    with tempfile.TemporaryDirectory() as folder:
        generate(python, Path(folder))
        fresh, present = Path(folder) / PROTO.parent, ROOT / PROTO.parent
        return [
            name
            for name in GENERATED
            if (fresh / name).read_bytes() != (present / name).read_bytes()
        ]


def main() -> int:
    """Generate in place, or compare; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        python = install(Path(folder))
        if sys.argv[1:] != ["--check"]:
            generate(python, ROOT)
            return 0
        if changed := stale(python):
            print(
                f"not what {PROTO} generates: {', '.join(changed)}; run: make protos",
                file=sys.stderr,
            )
        return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
