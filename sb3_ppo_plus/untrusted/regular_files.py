"""Opens regular files only: a device never ends, a named pipe blocks for ever, a hole is memory without a file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from sb3_ppo_plus.errors import UntrustedFileError

#: Bytes of a file that may be holes, which take no room on the disk, if they are more than half of it
MAX_HOLES = 64 * 2**20
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
# Without this flag, opening a named pipe waits for somebody who writes
_FLAGS |= getattr(os, "O_NONBLOCK", 0)


def open_regular_file(path: str | Path, follows_links: bool = True) -> IO[bytes]:
    """Open a file for reading if it is a regular one.

    :param path: the file
    :param follows_links: whether ``path`` itself may be a symbolic link; the folders above it may always be
    :raises UntrustedFileError: if it is a folder, a device, a named pipe, a link that is not followed, or mostly holes
    :raises OSError: if it cannot be opened
    """
    flags = _FLAGS
    if not follows_links:
        # Not every system has the flag
        if os.path.islink(path):
            raise UntrustedFileError(f"{path} is a symbolic link")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedFileError(f"{path} is a symbolic link") from error
        # A socket cannot be opened, nor can a folder on some systems
        if error.errno in (errno.ENXIO, errno.EISDIR) or os.path.isdir(path):
            raise UntrustedFileError(f"{path} is no regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedFileError(f"{path} is no regular file")
        if status.st_size > MAX_HOLES and _holes(descriptor, status.st_size) > max(MAX_HOLES, status.st_size // 2):
            raise UntrustedFileError(f"{path} has {status.st_size} bytes, most of which are holes")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | Path, max_bytes: int, follows_links: bool = True) -> bytes:
    """Read a regular file whose size has a limit. The size is checked before reading.

    :param path: the file
    :param max_bytes: largest size allowed
    :param follows_links: as in :func:`open_regular_file`
    :raises UntrustedFileError: if it is larger, or no regular file
    :raises OSError: if it cannot be read
    """
    with open_regular_file(path, follows_links) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            # Python takes as much memory as it is asked to read
            content = file.read(size + 1)
            if len(content) > size:
                # It has grown after its size was read
                content += file.read(max_bytes + 1 - len(content))
            size = len(content)
        if size > max_bytes:
            raise UntrustedFileError(f"{path} has {size} bytes; at most {max_bytes} are allowed")
    return content


def _holes(descriptor: int, size: int) -> int:
    """Return how many bytes of a file are holes, as far as the system tells."""
    if not hasattr(os, "SEEK_DATA"):
        return 0
    n_bytes = position = 0
    while position < size and n_bytes <= size // 2:
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                # This file system knows no holes
                break
            # There is no data behind this position
            data = size
        n_bytes += data - position
        position = os.lseek(descriptor, data, os.SEEK_HOLE) if data < size else size
    os.lseek(descriptor, 0, os.SEEK_SET)
    return n_bytes
