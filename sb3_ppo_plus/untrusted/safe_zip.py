"""Reads the members of untrusted zip archives into memory. Nothing is extracted to the disk."""

from __future__ import annotations

import io
import os
import pathlib
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from stable_baselines3.common.save_util import open_path

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.untrusted.strict_json import short

#: Bytes of the record at the end of an archive, of its comment, and of a member's entry in the list: its name and 46
#: more
RECORD, MAX_COMMENT, MAX_ENTRY = 22, 2**16, 512


@contextmanager
def opened_model(path: str | pathlib.Path | io.BufferedIOBase) -> Iterator[IO[bytes]]:
    """Open a saved model as SB3's ``load`` does. A file that the caller has opened stays open, at its position.

    :param path: the file, or its path, with or without ".zip"
    :raises UntrustedFileError: if the path is that of a folder, a device or a named pipe
    """
    file: Any = None
    if isinstance(path, str | pathlib.Path):
        with suppress(FileNotFoundError):
            file = open_regular_file(path if os.path.exists(path) else f"{path}.zip")
    if file is None:
        # An open file; or there is none, which SB3's own error says
        file = open_path(path, "r", verbose=0, suffix="zip")
    position = file.tell()
    try:
        yield file
    finally:
        is_callers = file is path
        if is_callers:
            file.seek(position)
        else:
            file.close()


def read_members(file: IO[bytes], name: str, allows: Callable[[str], bool], max_members: int) -> dict[str, bytes]:
    """Read a zip archive whose members are not compressed: SB3 and PyTorch write such archives.

    So the contents are never larger than the file.

    :param file: the archive
    :param name: what to call it in messages
    :param allows: tells whether a member may have a name
    :param max_members: largest number of members
    :return: contents by name
    :raises UntrustedFileError: if the archive is damaged, if a name is unknown or occurs twice, or if members are
        compressed, encrypted, links or folders, or overlap
    """
    try:
        bounded = _ReadsInParts(file, name, max(max_members * MAX_ENTRY, MAX_COMMENT + RECORD))
        with zipfile.ZipFile(bounded) as archive:
            bounded.limit = None
            infos = archive.infolist()
            if len(infos) > max_members:
                raise UntrustedFileError(f"{name} has {len(infos)} members; at most {max_members} are allowed")
            _check_members(infos, name, allows)
            file_size = file.seek(0, io.SEEK_END)
            total = sum(info.file_size for info in infos)
            if total > file_size:
                raise UntrustedFileError(
                    f"{name} claims to hold {total} bytes, but has {file_size}: its members overlap"
                )
            return {info.filename: archive.read(info) for info in infos}
    except UntrustedFileError:
        raise
    except Exception as error:
        # zipfile raises a dozen types of errors for damaged archives
        raise UntrustedFileError(f"{name} is no readable zip archive: {type(error).__name__}: {error}") from error


class _ReadsInParts:
    """A file of which no more than a limit is read at once.

    zipfile reads the list of members in one piece, whichever of an archive's several records states its size. Each
    entry takes time and memory.

    :param file: the file
    :param name: what to call it in messages
    :param limit: largest number of bytes; None: no limit
    """

    def __init__(self, file: IO[bytes], name: str, limit: int | None) -> None:
        self.limit = limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file
        self._name = name

    def read(self, size: int = -1) -> bytes:
        """Read bytes.

        :param size: how many; below 0: the rest
        :raises UntrustedFileError: if these are too many
        """
        if size < 0:
            position = self.tell()
            size = self.seek(0, io.SEEK_END) - position
            self.seek(position)
        if self.limit is not None and size > self.limit:
            raise UntrustedFileError(
                f"{self._name} lists its members in {size} bytes; at most {self.limit} are allowed"
            )
        return self._file.read(size)


def _check_members(infos: list[zipfile.ZipInfo], name: str, allows: Callable[[str], bool]) -> None:
    seen = set()
    for info in infos:
        member = f"{name}: member {short(info.orig_filename)}"
        if info.filename in seen:
            raise UntrustedFileError(f"{member} occurs twice")
        seen.add(info.filename)
        if info.orig_filename != info.filename or not allows(info.filename):
            raise UntrustedFileError(f"{member} does not belong there")
        # The upper half of these bits is the file's type in Unix; 0: unknown
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise UntrustedFileError(f"{member} is a link or another special file")
        if info.flag_bits & 0x1:
            raise UntrustedFileError(f"{member} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UntrustedFileError(f"{member} is compressed, which neither SB3 nor PyTorch does")
