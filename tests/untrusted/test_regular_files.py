"""Only regular files are opened, and no more of them is read than allowed."""

import os
import socket

import pytest

from sb3_ppo_plus import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import open_regular_file, read_regular_file


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert read_regular_file(tmp_path / "file", 3) == b"abc"
    with open_regular_file(str(tmp_path / "file")) as file:
        assert file.read() == b"abc"


def test_a_larger_file_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abcd")
    with pytest.raises(UntrustedFileError, match="has 4 bytes; at most 3 are allowed"):
        read_regular_file(tmp_path / "file", 3)


def test_links_are_followed_if_they_may_be(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "link", 3) == b"abc"
    with pytest.raises(UntrustedFileError, match="is a symbolic link"):
        read_regular_file(tmp_path / "link", 3, follows_links=False)


def test_folders_above_may_be_links(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("folder")
    assert read_regular_file(tmp_path / "link" / "file", 3, follows_links=False) == b"abc"


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "/dev/zero", "/dev/null", "link to /dev/zero"])
def test_what_is_no_regular_file_is_refused(kind, tmp_path, monkeypatch):
    # The path of a socket must be short
    monkeypatch.chdir(tmp_path)
    path = "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind.startswith("link"):
        os.symlink("/dev/zero", path)
    else:
        path = kind
    with pytest.raises(UntrustedFileError, match="no regular file"):
        read_regular_file(path, 10)


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular_file(tmp_path / "none")


def test_holes_are_not_read(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(2**40)
    with pytest.raises(UntrustedFileError, match="most of which are holes"):
        open_regular_file(path)


def test_a_file_that_grows_while_it_is_read_has_the_same_limit(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    status = os.stat(path)
    small = os.stat_result((*status[:6], 2, *status[7:]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: small)
    with pytest.raises(UntrustedFileError, match="at most 3"):
        read_regular_file(path, 3)


def test_memory_is_taken_for_the_file_and_not_for_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular_file(tmp_path / "file", 2**50) == b"content"
