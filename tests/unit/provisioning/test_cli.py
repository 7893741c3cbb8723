from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flplatform.security.kit import Kit
from provisioning.cli import main

TEXT = """
name: heart
server: {organisation: hub, addresses: [localhost]}
sites: [{name: s, organisation: a}]
admins: [{name: amy, organisation: a, role: lead}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "project.yml"
    path.write_text(TEXT)
    return path


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_provision_verify_revoke_renew(file: Path) -> None:
    folder = file.parent / "federation" / "heart"
    made = call("provision", file)
    assert made.exit_code == 0
    assert "3 kits made, 0 unchanged" in made.output
    kit = Kit.open(folder / "kits" / "amy")
    assert kit.trust.root_fingerprint in made.output

    checked = call("verify", folder / "kits" / "amy")
    assert checked.exit_code == 0
    assert "flp://heart/admin/a/amy lead\ncertificate valid for 364 days" in checked.output

    revoked = call("revoke", file, "s")
    assert revoked.exit_code == 0
    assert "crl.pem" in revoked.output
    refused = call("verify", folder / "kits" / "s")
    assert refused.exit_code == 2
    assert "it is revoked" in refused.stderr

    assert "1 kits made, 2 unchanged" in call("renew", file, "s").output
    assert call("verify", folder / "kits" / "s").exit_code == 0
    file.write_text(TEXT.replace("sites: [{name: s, organisation: a}]", ""))
    assert "s is no longer in the project" in call("provision", file).output


def test_out_and_password_file(file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    words = ("provision", file, "--out", tmp_path / "o", "--password-file", secret)
    assert call(*words).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "o/heart/secrets").iterdir()) == ["amy.txt"]
    secret.chmod(0o644)
    assert "others may read it" in call(*words).stderr
    secret.chmod(0o600)
    secret.write_text("\n")
    assert "is empty" in call(*words).stderr
    secret.unlink()
    assert "No such file" in call(*words).stderr


def test_errors_are_listed_without_traceback(file: Path) -> None:
    file.write_text(TEXT.replace("role: lead", "role: king").replace("name: s,", "nmae: s,"))
    result = call("provision", file)
    assert result.exit_code == 2
    assert "admins[0].role" in result.stderr
    assert "sites[0].nmae: unknown key; did you mean 'name'?" in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert list(file.parent.iterdir()) == [file]


def test_other_failures(file: Path, tmp_path: Path) -> None:
    call("provision", file)
    assert call("revoke", file, "nobody").exit_code == 1
    (tmp_path / "plain").write_text("")
    refused = call("provision", file, "--out", tmp_path / "plain")
    assert (refused.exit_code, "plain is no folder" in refused.stderr) == (2, True)
    assert call().exit_code == 2
