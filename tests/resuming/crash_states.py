"""Records what a save does to the file system, and rebuilds what a crash of the machine may leave of it.

The model is the strict one of POSIX. The bytes of a file are on the disk after fsync of the file, and a name in a
directory (made, renamed, removed) after fsync of the directory. What no fsync has put there may be there in part: of
such operations any subset may have reached the disk, of a write also its first half, or zeros in its place.
"""

import itertools
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

MOST_STATES = 25
"""Crash states of one moment; where there are more, so many are drawn."""
DROPPED, DONE, HALF, ZEROS = range(4)


@dataclass
class Disk:
    """Directories (names to numbers) and files (numbers to contents). The root has the number 0."""

    directories: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> "Disk":
        disk = cls()
        disk.add(root)
        return disk

    def add(self, path: Path) -> int:
        number = len(self.directories) + len(self.files)
        if path.is_dir():
            self.directories[number] = {}
            for child in sorted(path.iterdir()):
                self.directories[number][child.name] = self.add(child)
        else:
            self.files[number] = path.read_bytes()
        return number

    def copy(self) -> "Disk":
        return Disk({number: dict(names) for number, names in self.directories.items()}, dict(self.files))

    def write_to(self, folder: Path, number: int = 0) -> None:
        folder.mkdir()
        for name, child in self.directories[number].items():
            if child in self.files:
                (folder / name).write_bytes(self.files[child])
            else:
                self.write_to(folder / name, child)

    def contents(self, number: int = 0) -> Any:
        """All that can be reached, as a value that can be compared."""
        if number in self.files:
            return self.files[number]
        return tuple((name, self.contents(child)) for name, child in sorted(self.directories[number].items()))


@dataclass(frozen=True)
class Operation:
    """One change, or one fsync.

    :param kind: "make" or "remove" a name, "rename", "write", "fsync"
    :param target: number of the directory whose names change, or of the file whose bytes change
    """

    kind: str
    target: int
    name: str = ""
    new_name: str = ""
    number: int = -1
    offset: int = 0
    content: bytes = b""

    def apply(self, disk: Disk, how: int) -> None:
        if how == DROPPED or self.kind == "fsync":
            return
        if self.kind == "write":
            content = {
                DONE: self.content,
                HALF: self.content[: len(self.content) // 2],
                ZEROS: bytes(len(self.content)),
            }
            before = disk.files[self.target].ljust(self.offset, b"\0")
            end = self.offset + len(content[how])
            disk.files[self.target] = before[: self.offset] + content[how] + before[end:]
            return
        names = disk.directories[self.target]
        names.pop(self.name, None)
        if self.kind == "make":
            names[self.name] = self.number
        elif self.kind == "rename":
            names[self.new_name] = self.number


class Recorder:
    """Records the operations of this process below a folder.

    :param root: the folder; all that is in it is on the disk
    :param largest_write: bytes that one write takes
    """

    def __init__(self, root: Path, largest_write: int = 40) -> None:
        self.root, self.largest_write = root, largest_write
        self.operations: list[Operation] = []
        self.before = Disk.of(root)
        self._disk = self.before.copy()
        self._numbers_of_open: dict[int, int] = {}
        self._positions: dict[int, int] = {}

    @contextmanager
    def recording(self, monkeypatch) -> Iterator[None]:
        with monkeypatch.context() as patched:
            for recorded in (self.mkdir, self.open, self.write, self.fsync, self.rename, self.unlink, self.rmdir):
                name = recorded.__name__
                patched.setattr(os, name, partial(recorded, getattr(os, name)))
            yield

    def states(self, n_done: int) -> Iterator[Disk]:
        """What a crash may leave after the first operations: every choice among the unsynced, or some of them."""
        done = self.operations[:n_done]
        choices = [self._choices(operation, done[index:]) for index, operation in enumerate(done)]
        drawn: Any = itertools.product(*choices)
        if math.prod(map(len, choices)) > MOST_STATES:
            draw = random.Random(n_done)
            drawn = [[choice[end] for choice in choices] for end in (0, -1)]
            drawn += [[draw.choice(choice) for choice in choices] for _ in range(MOST_STATES)]
        for how in drawn:
            disk = self.before.copy()
            for operation, one in zip(done, how, strict=True):
                operation.apply(disk, one)
            yield disk

    def _choices(self, operation: Operation, later: list[Operation]) -> tuple[int, ...]:
        if any(other.kind == "fsync" and other.target == operation.target for other in later):
            return (DONE,)
        return (DROPPED, HALF, ZEROS, DONE) if operation.kind == "write" else (DROPPED, DONE)

    def _note(self, *arguments: Any) -> None:
        operation = Operation(*arguments)
        self.operations.append(operation)
        operation.apply(self._disk, DONE)

    def _number(self, path: Path) -> int:
        number = 0
        for name in path.relative_to(self.root).parts:
            number = self._disk.directories[number][name]
        return number

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str]:
        """Number of the directory, and name in it."""
        if dir_fd is not None:
            return self._numbers_of_open[dir_fd], str(path)
        return self._number(Path(path).parent), Path(path).name

    def _make(self, place: tuple[int, str], is_directory: bool) -> None:
        number = len(self._disk.directories) + len(self._disk.files)
        for disk in (self.before, self._disk):
            if is_directory:
                disk.directories[number] = {}
            else:
                disk.files[number] = b""
        self._note("make", *place, "", number)

    def mkdir(self, real, path, *arguments, dir_fd=None):
        real(path, *arguments, dir_fd=dir_fd)
        self._make(self._place(path, dir_fd), is_directory=True)

    def open(self, real, path, flags, *arguments, dir_fd=None):
        descriptor = real(path, flags, *arguments, dir_fd=dir_fd)
        target, name = self._place(path, dir_fd) if Path(path) != self.root else (0, "")
        if name and name not in self._disk.directories[target]:
            self._make((target, name), is_directory=False)
        self._numbers_of_open[descriptor] = self._disk.directories[target][name] if name else 0
        self._positions[descriptor] = 0
        return descriptor

    def write(self, real, descriptor, content):
        content = bytes(content)[: self.largest_write]
        n_written = real(descriptor, content)
        position = self._positions[descriptor]
        self._note("write", self._numbers_of_open[descriptor], "", "", -1, position, content[:n_written])
        self._positions[descriptor] += n_written
        return n_written

    def fsync(self, real, descriptor):
        self._note("fsync", self._numbers_of_open[descriptor])

    def rename(self, real, old, new):
        real(old, new)
        (target, name), (new_target, new_name) = self._place(old, None), self._place(new, None)
        assert target == new_target
        self._note("rename", target, name, new_name, self._disk.directories[target][name])

    def unlink(self, real, path, *, dir_fd=None):
        real(path, dir_fd=dir_fd)
        self._note("remove", *self._place(path, dir_fd))

    def rmdir(self, real, path, *, dir_fd=None):
        real(path, dir_fd=dir_fd)
        self._note("remove", *self._place(path, dir_fd))
