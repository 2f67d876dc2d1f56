"""What a hostile file would do."""

import os


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def make_special_file(path, kind):
    """Make what is no regular file, or one that is mostly holes, in place of a file that is read.

    :param kind: "fifo", "folder", "holes", or the target of a link
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "holes":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.symlink_to(kind)
