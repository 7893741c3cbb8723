import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from flplatform.core.errors import ConfigError, FLError, NotFoundError, UnauthenticatedError
from flplatform.security.kit import Kit
from provisioning import builders
from provisioning import provision as steps
from provisioning.project import Admin, Project, Server, Site
from provisioning.provision import provision, revoke

Snapshot = dict[str, tuple[bytes, int, int]]


def project(*sites: str, admins: tuple[str, ...] = ("amy",), port: int = 8002) -> Project:
    return Project(
        name="heart",
        server=Server(organisation="hub", addresses=("localhost",), fl_port=port),
        sites=tuple(Site(name=name, organisation="a") for name in sites),
        admins=tuple(Admin(name=name, organisation="a", role="lead") for name in admins),
    )


def snapshot(folder: Path) -> Snapshot:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_everything_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = provision(project("s"), tmp_path / "out").folder
    finally:
        os.umask(old)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_report_names_what_was_made(tmp_path: Path) -> None:
    report = provision(project("s", "t"), tmp_path)
    assert report.folder == tmp_path / "heart"
    assert report.made == ("server", "s", "t", "amy")
    assert Kit.open(report.folder / "kits" / "s").trust.root_fingerprint == report.root_fingerprint


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    provision(project("s"), tmp_path)
    before = snapshot(tmp_path)
    report = provision(project("s"), tmp_path)
    assert snapshot(tmp_path) == before
    assert (report.made, report.unchanged) == ((), ("amy", "s", "server"))


def test_adding_a_site_touches_no_other_kit(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    before = {name: snapshot(folder / "kits" / name) for name in ("server", "s", "amy")}
    assert provision(project("s", "t"), tmp_path).made == ("t",)
    assert before == {name: snapshot(folder / "kits" / name) for name in before}
    added, server = Kit.open(folder / "kits/t"), Kit.open(folder / "kits/server")
    assert server.trust.verify_chain(added.chain, "site").name == "t"


def test_kits_that_were_moved_away_are_not_made_again(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    (folder / "kits" / "s").rename(tmp_path / "s")
    assert provision(project("s", "t"), tmp_path).made == ("t",)
    assert not (folder / "kits" / "s").exists()


def test_the_root_key_is_needed_only_once(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    (folder / "state" / "root.key").unlink()
    provision(project("s", "t"), tmp_path)
    revoke(folder, "t")
    Kit.open(folder / "kits" / "s")


def test_changed_inputs_make_a_new_kit_and_keep_local_files(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    policy = folder / "kits/s/local/policy.yml"
    policy.write_text("byoc: none\n")
    (folder / "kits/s/local/datasets.yml").unlink()
    (folder / "kits/s/transfer/mine").write_text("")
    passphrase = (folder / "secrets/amy.txt").read_text()
    report = provision(project("s", port=9000), tmp_path)
    assert report.made == ("server", "s")
    assert policy.read_text() == "byoc: none\n"
    assert (folder / "kits/s/local/datasets.yml").exists()
    assert (folder / "kits/s/transfer/mine").exists()
    assert Kit.open(folder / "kits/s").site.servers == ("localhost:9000",)
    assert provision(project("s", port=9000), tmp_path, renew=["amy"]).made == ("amy",)
    assert (folder / "secrets/amy.txt").read_text() == passphrase
    Kit.open(folder / "kits/amy").private_key(passphrase.strip())


def test_who_left_the_project_is_named(tmp_path: Path) -> None:
    folder = provision(project("s", "t"), tmp_path).folder
    assert provision(project("s"), tmp_path).left_over == ("t",)
    revoke(folder, "t")
    assert provision(project("s"), tmp_path).left_over == ()


def test_revoking_reaches_every_kit_and_lasts(tmp_path: Path) -> None:
    folder = provision(project("s", "t"), tmp_path).folder
    thief = Kit.open(folder / "kits/t")
    stolen = thief.chain
    manifest = (folder / "kits/server/startup/manifest.json").read_bytes()
    lists = revoke(folder, "t")
    assert (folder / "kits/server/startup/manifest.json").read_bytes() == manifest
    server = Kit.open(folder / "kits/server")
    assert (folder / "kits/server/startup/crl.pem").read_bytes() == lists.read_bytes()
    with pytest.raises(UnauthenticatedError, match="revoked"):
        server.trust.verify_chain(stolen, "site")
    server.trust.verify_chain(Kit.open(folder / "kits/s").chain, "site")
    revoke(folder, "s")
    again = Kit.open(folder / "kits/server").trust
    assert again.revoked > server.trust.revoked
    assert provision(project("s", "t"), tmp_path).made == ()  # revoked stays revoked
    provision(project("s", "t"), tmp_path, renew=["t"])
    fresh = Kit.open(folder / "kits/t")
    assert fresh.identity.serial != thief.identity.serial
    with pytest.raises(UnauthenticatedError, match="revoked"):
        fresh.trust.verify_chain(stolen, "site")
    with pytest.raises(NotFoundError, match="no certificate was issued to 'nobody'"):
        revoke(folder, "nobody")


def test_revoking_twice_is_harmless(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    first = revoke(folder, "s").read_bytes()
    second = revoke(folder, "s").read_bytes()
    assert first != second
    assert len(Kit.open(folder / "kits/server").trust.revoked) == 1


def test_a_passphrase_of_one_s_own_is_not_written_down(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path, passphrase="correct horse").folder
    assert [path.name for path in (folder / "secrets").iterdir()] == ["amy.txt"]
    with pytest.raises(ConfigError, match="give the passphrase by a file"):
        provision(project("s", "t"), tmp_path)
    with pytest.raises(UnauthenticatedError, match="does not open"):
        provision(project("s", "t"), tmp_path, passphrase="wrong")
    assert provision(project("s", "t"), tmp_path, passphrase="correct horse").made == ("t",)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("where", ["users", "_manifest", "_write_kit", "_ledger_line"])
def test_an_error_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, again: bool
) -> None:
    if again:
        provision(project("s"), tmp_path)
    before = snapshot(tmp_path)
    folders = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    if where == "users":
        monkeypatch.setattr(builders, "BUILDERS", (*builders.BUILDERS, fail))
    else:
        monkeypatch.setattr(builders if where == "_manifest" else steps, where, fail)
    with pytest.raises(OSError, match="No space"):
        provision(project("s", "t"), tmp_path)
    assert snapshot(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders
    monkeypatch.undo()
    provision(project("s", "t"), tmp_path)
    Kit.open(tmp_path / "heart/kits/t")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "heart").mkdir()
    with pytest.raises(ConfigError, match="holds no state of a federation"):
        provision(project("s"), tmp_path)
    with pytest.raises(ConfigError, match="holds no state of a federation"):
        revoke(tmp_path, "s")


def test_renewing_a_stranger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody is not in the project"):
        provision(project("s"), tmp_path, renew=["nobody"])
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    (folder / "state/ledger.json").write_text("{")
    with pytest.raises(FLError, match=r"ledger\.json"):
        provision(project("s", "t"), tmp_path)


def test_private_secrets_only(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    (folder / "secrets/authority.txt").chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        provision(project("s", "t"), tmp_path)


def test_authority_keys_are_encrypted_and_in_no_kit(tmp_path: Path) -> None:
    folder = provision(project("s"), tmp_path).folder
    for path in (folder / "state").glob("*.key"):
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    kits = [p for p in (folder / "kits").rglob("*") if p.name.endswith(".key")]
    assert {path.name for path in kits} == {"participant.key"}


def test_years_later_the_lists_still_hold(tmp_path: Path) -> None:
    born = datetime.now(UTC) - timedelta(days=3000)
    provision(project("s"), tmp_path, now=born)
    provision(project("s"), tmp_path, renew=["s"])
    kit = Kit.open(tmp_path / "heart/kits/s")
    leaf = x509.load_pem_x509_certificate(kit.chain)
    assert leaf.not_valid_after_utc - datetime.now(UTC) > timedelta(days=300)


def test_a_thousand_sites(tmp_path: Path) -> None:
    report = provision(project(*(f"site-{n}" for n in range(1000)), admins=()), tmp_path)
    Kit.open(report.folder / "kits/site-999")
    assert provision(project(*(f"site-{n}" for n in range(1001)), admins=()), tmp_path).made == (
        "site-1000",
    )
