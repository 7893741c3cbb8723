"""`fl_state verify BACKUP KIT`: a backup checked without restoring it."""

from dataclasses import replace
from pathlib import Path

from flplatform.core.errors import DataLossError, UnauthenticatedError
from flplatform.security.kit import Kit
from flplatform.server.upkeep.backup import MANIFEST, Manifest
from flplatform.server.upkeep.findings import Finding
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import read_backup
from flplatform.server.upkeep.verify import Report, verify_state
from flplatform.server.wording import count

WHOLE = "whole backup"


def is_backup(folder: Path) -> bool:
    """Return whether a folder is to be a backup, and not a kit."""
    return (folder / MANIFEST).exists()


def verify_backup(folder: Path, kit: Kit, deep: bool = False) -> tuple[Manifest | None, Report]:
    """Check a backup: its signature and every byte, and of the state in it what holds of any.

    Args:
        folder: the backup.
        kit: of the server that made it.
        deep: read the headers of all models too.

    Returns:
        What the backup says of itself, None if it is not to be believed; what was found.

    Raises:
        NotFoundError: it is no backup.
        ConfigError: it is another server's.
        FLError: its log cannot be opened.
        OSError: it cannot be read.
    """
    try:
        manifest = read_backup(folder, kit)
    except (DataLossError, UnauthenticatedError) as error:
        advice = error.hint or "take another backup"
        return None, Report((Finding(str(folder), WHOLE, error.message, advice),))
    report = verify_state(Place.of_backup(folder, kit), deep)
    if manifest.problems:
        had = count(len(manifest.problems), "problem")
        text = f"the state had {had}, the first: {manifest.problems[0]}"
        told = Finding(MANIFEST, WHOLE, text, "take another backup, or restore it with --damaged")
        report = replace(report, findings=(told, *report.findings))
    return manifest, replace(report, deep=True)
