"""What a site keeps of downloaded blobs: bounded, the oldest go first."""

from collections.abc import Collection

from flplatform.core.errors import NotFoundError
from flplatform.core.ports import BlobStore


def trim(blobs: BlobStore, keep: Collection[str], limit_bytes: int) -> list[str]:
    """Delete the oldest blobs until the rest fits; return the digests of the deleted.

    A file that is mapped or linked elsewhere lives on there.

    Args:
        blobs: the site's blobs.
        keep: digests that are needed; they count, but stay.
        limit_bytes: most that all blobs together may take.
    """
    found = []
    for digest in blobs.digests():
        try:
            status = blobs.path(digest).stat()
        except (NotFoundError, FileNotFoundError):
            continue
        found.append((status.st_mtime_ns, digest, status.st_size))
    total = sum(size for _, _, size in found)
    deleted = []
    for _, digest, size in sorted(found):
        if total <= limit_bytes:
            break
        if digest not in keep:
            blobs.delete(digest)
            deleted.append(digest)
            total -= size
    return deleted
