"""Help for writing large files: room set aside beforehand, bytes on their way to the disk early.

Both are advice that Python's `os` has no call for; without them everything still works.
"""

import ctypes
import errno
import os

KEEP_SIZE = 1
"""`FALLOC_FL_KEEP_SIZE`: the file's size goes on telling how much was written."""

START_WRITING = 2
"""`SYNC_FILE_RANGE_WRITE`: begin, and do not wait."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM}

try:
    _LIBC: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True)
except OSError:  # no shared C library: advice cannot be given
    _LIBC = None


def _call(name: str, *arguments: int) -> None:
    function = getattr(_LIBC, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, name)
    function.argtypes = [ctypes.c_int, *_ARGUMENTS[name]]
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_ARGUMENTS = {
    "fallocate": [ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
    "sync_file_range": [ctypes.c_int64, ctypes.c_int64, ctypes.c_uint],
}


def set_aside(handle: int, offset: int, count: int) -> bool:
    """Reserve disk space for bytes of a file that come later; its size stays as it is.

    Returns:
        Whether that is done; some file systems cannot, and the disk may be too full.

    Raises:
        OSError: the disk refused.
    """
    try:
        _call("fallocate", handle, KEEP_SIZE, offset, count)
    except OSError as error:
        if error.errno in _UNSUPPORTED | {errno.ENOSPC, errno.EDQUOT}:
            return False
        raise
    return True


def start_writing(handle: int, offset: int, count: int) -> None:
    """Let the kernel begin to write bytes to the disk, so that a sync finds little to do.

    Raises:
        OSError: the disk refused.
    """
    try:
        _call("sync_file_range", handle, offset, count, START_WRITING)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.ESPIPE}:
            raise
