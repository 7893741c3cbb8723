"""`fl_provision`: makes, renews, revokes and verifies startup kits.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or a wrong `project.yml`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from flplatform.core.errors import ConfigError, FLError
from flplatform.files.durable import check_private
from flplatform.security.kit import Kit
from provisioning import provision as steps
from provisioning.project import load_project

main = typer.Typer(
    name="fl_provision",
    help="Make, renew, revoke and verify the startup kits of a federation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ProjectFile = Annotated[Path, typer.Argument(help="The federation's project.yml.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of federations; by default `federation` beside project.yml."),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(help="Holds the passphrase of the authority's keys; else it lies in secrets/."),
]


@main.command()
def provision(project: ProjectFile, out: Out = None, password_file: PasswordFile = None) -> None:
    """Make the kits that are missing. Existing ones whose inputs are unchanged stay as they are."""
    with _errors():
        _report(
            steps.provision(
                load_project(project), _out(project, out), passphrase=_passphrase(password_file)
            )
        )


@main.command()
def renew(
    project: ProjectFile,
    names: Annotated[list[str], typer.Argument(help="Whose kits.")],
    out: Out = None,
    password_file: PasswordFile = None,
) -> None:
    """Make kits anew, with new keys and certificates; what the owner set in local/ stays.

    Old certificates stay valid until they expire; revoke first if a key was lost.
    """
    with _errors():
        _report(
            steps.provision(
                load_project(project),
                _out(project, out),
                passphrase=_passphrase(password_file),
                renew=names,
            )
        )


@main.command()
def revoke(
    project: ProjectFile,
    name: Annotated[str, typer.Argument(help="Whose certificates.")],
    out: Out = None,
    password_file: PasswordFile = None,
) -> None:
    """Revoke all certificates of a participant, for good."""
    with _errors():
        folder = _out(project, out) / load_project(project).name
        lists = steps.revoke(folder, name, passphrase=_passphrase(password_file))
        typer.echo(f"revoked {name}; copy {lists} to startup/crl.pem of the server and every site")


@main.command()
def verify(kit: Annotated[Path, typer.Argument(help="A startup kit's folder.")]) -> None:
    """Check a kit: signatures, files, certificate, key, modes, expiry, local files."""
    with _errors():
        found = Kit.open(kit)
        days = (found.identity.not_after - datetime.now(UTC)).days
        typer.echo(f"{found.identity.uri} {found.identity.role}".rstrip())
        typer.echo(f"certificate valid for {days} days, SHA-256 {found.identity.fingerprint}")
        typer.echo(f"root SHA-256 {found.trust.root_fingerprint}")


def _out(project: Path, out: Path | None) -> Path:
    return project.resolve().parent / "federation" if out is None else out


def _passphrase(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        check_private(path)
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not text:
        raise ConfigError(f"{path} is empty")
    return text


def _report(report: steps.Report) -> None:
    typer.echo(f"federation {report.folder.name} in {report.folder}")
    typer.echo(f"root SHA-256 {report.root_fingerprint}")
    typer.echo(f"{len(report.made)} kits made, {len(report.unchanged)} unchanged")
    for name in report.made:
        typer.echo(f"  {report.folder / 'kits' / name}")
    for name in report.left_over:
        typer.echo(f"  {name} is no longer in the project: `fl_provision revoke` ends its access")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except FLError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
