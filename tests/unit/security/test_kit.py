import hashlib
import os
import re
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from flplatform.core.config import AdminConfig, ServerConfig, SiteConfig, parse_json
from flplatform.core.errors import ConfigError, UnauthenticatedError
from flplatform.security import kit as kits
from flplatform.security.authn import UserRecord, password_of, verify_password
from flplatform.security.authz import DEFAULT_RULES, rules_of
from flplatform.security.kit import Kit, Local
from flplatform.security.signing import sign
from provisioning.authority import key_pem, new_key
from provisioning.provision import _load_authority
from tests.support.federation import Federation, provision

FILES = {
    "server": [
        *("fed_server.json", "participant.crt", "participant.key", "root.crt"),
        *("server_issuer.crt", "site_issuer.crt", "user_issuer.crt", "start.sh", "stop.sh"),
        "flplatform-server.service",
    ],
    "site-1": [
        *("fed_client.json", "participant.crt", "participant.key", "root.crt"),
        *("server_issuer.crt", "site_issuer.crt", "user_issuer.crt", "start.sh", "stop.sh"),
        "flplatform-site.service",
    ],
    "amy": [
        *("fed_admin.json", "participant.crt", "participant.key", "root.crt"),
        *("server_issuer.crt", "user_issuer.crt", "fl_admin.sh", "user.json", "user.sig"),
    ],
}
UNPINNED = ["manifest.json", "manifest.sig", "crl.pem"]


def problems_of(folder: Path, now: datetime | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        Kit.open(folder, now)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_kit_has_these_files_and_no_others(own: Federation, name: str) -> None:
    startup = own.kit(name) / "startup"
    assert sorted(path.name for path in startup.iterdir()) == sorted(FILES[name] + UNPINNED)


@pytest.mark.parametrize(
    ("name", "model"), [("server", ServerConfig), ("site-1", SiteConfig), ("amy", AdminConfig)]
)
def test_opening_gives_typed_access(own: Federation, name: str, model: type) -> None:
    kit = own.open(name)
    assert isinstance(kit.config, model)
    assert kit.identity.name == kit.config.name == name
    assert kit.trust.root_fingerprint == own.open("server").trust.root_fingerprint
    assert kit.chain.count(b"BEGIN CERTIFICATE") == 2
    assert kit.key_path.name == "participant.key"


def test_each_kind_of_kit_is_only_itself(own: Federation) -> None:
    server, site, admin = own.open("server"), own.open("site-1"), own.open("amy")
    assert (server.server.name, site.site.name, admin.admin.name) == ("server", "site-1", "amy")
    assert server.state_folder() == server.folder / "state"
    for kit, wrong in ((server, "site"), (site, "admin"), (admin, "server")):
        with pytest.raises(ConfigError, match="is the kit of a"):
            getattr(kit, wrong)


PINNED = [(name, file) for name, files in FILES.items() for file in files]
PINNED.remove(("amy", "participant.key"))  # a person's passphrase may change


@pytest.mark.parametrize(("name", "file"), PINNED)
def test_each_file_is_protected(own: Federation, name: str, file: str) -> None:
    path = own.kit(name) / "startup" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert file in problems_of(own.kit(name))
    path.unlink()
    assert file in problems_of(own.kit(name))
    path.symlink_to("/dev/null")
    problems_of(own.kit(name))


@pytest.mark.parametrize("file", UNPINNED)
def test_the_manifest_and_the_lists_protect_themselves(own: Federation, file: str) -> None:
    path = own.kit("site-1") / "startup" / file
    content = path.read_bytes()
    for position in (40, 60, 80, 100):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert problems_of(own.kit("site-1"))
    path.unlink()
    assert file in problems_of(own.kit("site-1"))


def test_all_changed_files_are_named_at_once(own: Federation) -> None:
    startup = own.kit("server") / "startup"
    (startup / "start.sh").write_text("echo evil")
    (startup / "stop.sh").unlink()
    (startup / "extra.sh").write_text("")
    (startup / "folder").mkdir()
    text = problems_of(own.kit("server"))
    assert "startup/start.sh: was changed since it was signed" in text
    assert "startup/stop.sh: is missing" in text
    assert "startup/extra.sh: is not in the manifest" in text
    assert "startup/folder: is not a plain file" in text


@pytest.mark.parametrize(
    ("path", "mode", "cure"),
    [
        ("startup/participant.key", 0o640, "chmod 600"),
        ("startup/participant.key", 0o604, "chmod 600"),
        ("startup", 0o750, "chmod 700"),
        ("local", 0o777, "chmod 700"),
        (".", 0o755, "chmod 700"),
    ],
)
def test_loose_modes_are_refused(own: Federation, path: str, mode: int, cure: str) -> None:
    target = own.kit("site-1") / path
    target.chmod(mode)
    assert f"mode {mode:04o} lets others in; run: {cure} {target}" in problems_of(own.kit("site-1"))


def test_what_is_no_kit(tmp_path: Path) -> None:
    assert "has no startup folder" in problems_of(tmp_path)
    (tmp_path / "startup").mkdir()
    assert "root.crt is missing" in problems_of(tmp_path)


def resign(federation: Federation, name: str) -> None:
    """Sign the manifest again over what is there now, as a careless provisioner would."""
    startup = federation.kit(name) / "startup"
    manifest = parse_json(kits.Manifest, (startup / kits.MANIFEST).read_bytes(), "manifest")
    files = {
        file: hashlib.sha256((startup / file).read_bytes()).hexdigest() for file in manifest.files
    }
    payload = manifest.model_copy(update={"files": files}).model_dump_json().encode()
    signer = _load_authority(federation.folder, None).signer
    (startup / kits.MANIFEST).write_bytes(payload)
    signature = sign(kits.MANIFEST_TAG, payload, signer.key, signer.certificate).to_detached()
    (startup / kits.SIGNATURE).write_bytes(signature)


def test_a_key_that_does_not_match_is_refused(own: Federation) -> None:
    (own.kit("site-1") / "startup/participant.key").write_bytes(key_pem(new_key(), None))
    resign(own, "site-1")
    assert "participant.key is not the key of participant.crt" in problems_of(own.kit("site-1"))


def test_a_person_s_key_must_be_encrypted(own: Federation) -> None:
    plain = own.open("amy").key_pem(own.passphrase("amy"))
    (own.kit("amy") / "startup/participant.key").write_bytes(plain)
    resign(own, "amy")
    assert "must be encrypted with a passphrase" in problems_of(own.kit("amy"))


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (
            "fed_client.json",
            b'"name": "site-1"',
            b'"name": "site-2"',
            "is not about flp://test/site",
        ),
        ("fed_client.json", b'"project": "test"', b'"project": "tset"', "is not about flp://test"),
        ("fed_client.json", b'"api_version": 1', b'"api_version": 2', "startup/fed_client.json"),
        ("fed_client.json", b'"api_version"', b'"api_versoin"', "did you mean 'api_version'?"),
    ],
)
def test_contradictions_between_signed_files(
    own: Federation, file: str, old: bytes, new: bytes, complaint: str
) -> None:
    path = own.kit("site-1") / "startup" / file
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    resign(own, "site-1")
    assert complaint in problems_of(own.kit("site-1"))


def test_an_admin_cannot_raise_a_role(own: Federation) -> None:
    path = own.kit("amy") / "startup/fed_admin.json"
    path.write_bytes(path.read_bytes().replace(b"project_admin", b"member"))
    resign(own, "amy")
    assert "the role is not project_admin" in problems_of(own.kit("amy"))


def test_another_federation_s_kit_signature_is_refused(own: Federation, tmp_path: Path) -> None:
    other = provision(tmp_path / "other", sites=("site-1",), admins=())
    for file in ("manifest.json", "manifest.sig"):
        source = other.kit("site-1") / "startup" / file
        shutil.copy(source, own.kit("site-1") / "startup" / file)
    assert "not issued by an authority" in problems_of(own.kit("site-1"))


def test_expiry_is_named(tmp_path: Path) -> None:
    born = datetime.now(UTC) - timedelta(days=3)
    federation = provision(tmp_path, sites=("s",), admins=(), days=2, now=born)
    assert "participant.crt: certificate CN=s,O=s: it has expired at" in problems_of(
        federation.kit("s")
    )
    assert Kit.open(federation.kit("s"), born).identity.name == "s"
    assert "not yet valid" in problems_of(federation.kit("s"), born - timedelta(hours=1))


def test_a_revoked_kit_is_refused(own: Federation) -> None:
    kit = own.open("server")
    identity = own.open("site-1").identity
    own.revoke("site-1")
    assert "it is revoked" in problems_of(own.kit("site-1"))
    with pytest.raises(UnauthenticatedError, match="is revoked"):
        kit.reload_trust().check(identity, datetime.now(UTC))


def test_a_person_changes_the_passphrase_of_the_key(own: Federation) -> None:
    kit, old = own.open("amy"), own.passphrase("amy")
    before = kit.key_path.read_bytes()
    with pytest.raises(UnauthenticatedError):
        kit.change_passphrase("wrong", "another passphrase")
    assert kit.key_path.read_bytes() == before
    kit.change_passphrase(old, "another passphrase")
    again = own.open("amy")  # the kit is still whole
    assert again.key_pem("another passphrase") == load_key(before, old)
    assert stat.S_IMODE(kit.key_path.stat().st_mode) == 0o600
    with pytest.raises(UnauthenticatedError, match="the passphrase is wrong"):
        again.private_key(old)


def test_another_key_in_a_person_s_kit_is_noticed_when_it_is_opened(own: Federation) -> None:
    own.open("amy").key_path.write_bytes(key_pem(new_key(), "a passphrase"))
    with pytest.raises(ConfigError, match="is not the key of"):
        own.open("amy").private_key("a passphrase")
    own.open("amy").key_path.unlink()
    assert "startup/participant.key: is missing" in problems_of(own.kit("amy"))


def load_key(data: bytes, passphrase: str) -> bytes:
    key = load_pem_private_key(data, passphrase.encode())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_passphrases_open_keys(own: Federation) -> None:
    kit = own.open("amy")
    key = kit.private_key(own.passphrase("amy"))
    assert load_pem_private_key(kit.key_pem(own.passphrase("amy")), None) is not None
    assert key.curve.name == "secp256r1"
    with pytest.raises(UnauthenticatedError, match="the passphrase is wrong"):
        kit.private_key("wrong")
    with pytest.raises(UnauthenticatedError, match="needs a passphrase"):
        kit.private_key()
    with pytest.raises(UnauthenticatedError, match="is not encrypted"):
        own.open("site-1").private_key("x")


def test_the_user_record_holds_the_password_s_hash(own: Federation) -> None:
    record = UserRecord.model_validate_json(own.open("amy").user_record().payload)
    password = password_of(own.passphrase("amy"), "test", "amy")
    assert verify_password(record.password_hash, password)
    assert not verify_password(record.password_hash, own.passphrase("amy"))


def test_no_secret_lies_in_a_kit(own: Federation) -> None:
    secrets = [path.read_text().strip() for path in (own.folder / "secrets").iterdir()]
    assert len(secrets) == 2
    for path in (own.folder / "kits").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path
            assert b"PRIVATE KEY" not in content or path.name == "participant.key"


def test_local_files_are_read_and_all_their_problems_listed(own: Federation) -> None:
    own.local("site-1", "policy.yml", "byoc: none\nmax_examples: 5\n")
    own.local("site-1", "overrides.yml", "servers: ['fl.example.org:1']\n")
    kit = own.open("site-1")
    assert kit.local.site_policy.byoc == ("none",)
    assert kit.site.servers == ("fl.example.org:1",)
    own.local("site-1", "policy.yml", "bioc: none\n")
    own.local("site-1", "datasets.yml", "datasets: 1\n")
    (own.kit("site-1") / "local/resources.yml").write_bytes(b"\xff")
    text = problems_of(own.kit("site-1"))
    assert "local/policy.yml:1: bioc: unknown key; did you mean 'byoc'?" in text
    assert "local/datasets.yml:1: datasets: " in text
    assert "resources.yml: 'utf-8' codec" in text


def test_absent_local_files_mean_defaults(own: Federation) -> None:
    shutil.rmtree(own.kit("site-1") / "local")
    assert own.open("site-1").local == Local()


def test_an_override_of_another_kind_is_refused(own: Federation) -> None:
    own.local("server", "overrides.yml", "servers: ['a:1']\n")
    assert "servers: this kit has no such address" in problems_of(own.kit("server"))


def test_the_templates_say_what_the_defaults_are(own: Federation) -> None:
    """Every template parses with its settings uncommented; what is no example is the default."""
    for name in ("server", "site-1"):
        for path in (own.kit(name) / "local").glob("*.yml"):
            path.write_text(re.sub(r"(?m)^#(?! \S)", "", path.read_text()))
    server, site = own.open("server").local, own.open("site-1").local
    assert server.resources == Local().resources
    assert site.resources == Local().resources
    assert site.environments == Local().environments
    assert set(site.datasets.datasets) == {"heart"}
    assert rules_of(server.server_policy) == DEFAULT_RULES
    assert site.site_policy.max_examples == 100_000


def test_root_is_refused_where_the_owner_says_so(
    own: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("server", "site-1"):
        own.local(name, "policy.yml", "allow_root: false\n")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(ConfigError, match="allow_root: false"):
            own.open(name).check_user()
        monkeypatch.undo()
        kit = own.open(name)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        kit.check_user()
        monkeypatch.undo()
