import shutil

import pytest
from typer.testing import CliRunner

from flplatform.admin.console import main
from flplatform.admin.console.main import Options, _exit_code, app, banner
from flplatform.core.errors import (
    ConfigError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.rpc.v1 import federated_pb2 as pb


@pytest.fixture
def kit(federation, tmp_path):
    return shutil.copytree(federation.kit("amy"), tmp_path / "amy")


@pytest.fixture
def secret(federation, tmp_path):
    path = tmp_path / "secret"
    path.write_text(federation.passphrase("amy"))
    path.chmod(0o600)
    return path


def fl_admin(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_is_no_admins_kit(federation, tmp_path, secret):
    assert fl_admin(tmp_path, "-c", "x").exit_code == 2
    done = fl_admin(federation.kit("site-1"), "-c", "x", "--password-file", secret)
    assert done.exit_code == 2
    assert "not of an admin" in done.stderr


def test_nobody_to_ask_for_the_passphrase(kit):
    done = fl_admin(kit, "-c", "x")
    assert done.exit_code == 2
    assert "--password-file" in done.stderr


def test_the_passphrase_file_must_be_private_and_right(kit, secret):
    secret.chmod(0o644)
    done = fl_admin(kit, "-c", "x", "--password-file", secret)
    assert (done.exit_code, "chmod 600" in done.stderr) == (2, True)
    secret.chmod(0o600)
    secret.write_text("wrong")
    done = fl_admin(kit, "-c", "x", "--password-file", secret)
    assert (done.exit_code, "the passphrase is wrong" in done.stderr) == (3, True)
    assert fl_admin(kit, "-c", "x", "--password-file", secret / "x").exit_code == 1


def test_the_passphrase_file_may_be_named_by_the_environment(kit, secret, monkeypatch):
    (kit / "local" / "overrides.yml").write_text('servers: ["localhost:1"]')
    monkeypatch.setenv("FLP_PASSWORD_FILE", str(secret))
    done = fl_admin(kit, "-c", "x")
    assert done.exit_code == 4
    assert done.stderr.startswith("error: localhost:1: ")


def test_interrupted(kit, monkeypatch):
    async def interrupted(_: Options) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    assert fl_admin(kit).exit_code == 130


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (PermissionDeniedError("x"), 3),
        (UnauthenticatedError("x"), 3),
        (UnavailableError("x"), 4),
        (NotFoundError("x"), 1),
    ],
)
def test_exit_codes(error, code):
    assert _exit_code(error) == code


def test_the_banner_says_where_and_as_whom(transport, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    transport.address = "fl.example.org:8003"
    transport.welcome = pb.LoginReply(
        user="amy@clinic-a.org",
        role="project_admin",
        organisation="clinic-a",
        project="heart",
        version="0.1",
        server_days_left=341.4,
    )
    assert banner(transport) == (
        "flplatform 0.1  project heart  server fl.example.org:8003 (certificate valid 341 days)\n"
        "signed in as amy@clinic-a.org  project_admin of clinic-a      type help, or Tab"
    )
    monkeypatch.setenv("COLUMNS", "60")
    assert banner(transport).splitlines() == [
        "flplatform 0.1  project heart",
        "server fl.example.org:8003 (certificate valid 341 days)",
        "signed in as amy@clinic-a.org  project_admin of clinic-a",
        "type help, or Tab",
    ]
    transport.welcome.role = "\x1b[2Jboss"
    assert "\x1b" not in banner(transport)


def test_start_up_needs_no_heavy_library():
    import subprocess
    import sys

    heavy = ["numpy", "torch", "sqlalchemy", "prompt_toolkit", "textual", "flplatform.server"]
    code = (
        f"import sys, flplatform.entrypoints.admin; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
