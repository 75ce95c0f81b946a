"""What the disk says, as our error: which faults pass, and what a person can do about each.

A full disk passes, for somebody may free room, and so does an I/O error: what is tried again is the whole write, under
another name, and file servers answer so while they fail over.
"""

import errno

from shared.errors import StoreError

PASSING = {errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EBUSY, errno.ENOMEM}
PASSING |= {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
REFUSED = {errno.EACCES, errno.EPERM}
FREE_ROOM = "Free room or lower retention"
HINTS = {
    errno.ENOSPC: FREE_ROOM,
    errno.EDQUOT: "Free room, raise the quota or lower retention",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the machine's limit of open files (fs.file-max)",
    errno.EIO: "Look at the disk, or at the file server (dmesg)",
    errno.ESTALE: "The file changed on its server; the next try opens it anew",
    errno.EROFS: "Mount it for writing; a disk that failed is remounted read-only",
    **dict.fromkeys(REFUSED, "Check owner and mode"),
}


def disk_error(error: OSError, *, op: str, key: str, hint: str = "Look at the file system") -> StoreError:
    """The error to raise from an operating system's.

    Args:
        hint: for faults that have none of their own.
    """
    problem = f"{error.strerror or error}"
    if error.filename and error.errno in REFUSED:
        problem += f": {error.filename}"
    hint = HINTS.get(error.errno or 0, hint)
    return StoreError(problem, op=op, key=key, hint=hint, retryable=error.errno in PASSING)
