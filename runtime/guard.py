"""A rank that is killed cannot say so: a small process beside it notices that it is gone, and names it."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
from contextlib import suppress

# A word says that the rank ends by itself; the end of the pipe without one, that it did not. Of the ranks of a host only
# the first to go can make the file: the launcher kills the others for it, which is no news. The shell makes it itself,
# since a program that does would start only after those beside it, on a machine that is busy.
_SCRIPT = 'read -r word || { set -C; { : > "$1/first"; } 2> /dev/null && { echo "$2" >&2; rm -r "$1"; }; }'


class Guard:
    """Says on stderr that this process was killed or has crashed, if that happens before ``dismiss``."""

    def __init__(self, rank: int, size: int, folder: str) -> None:
        """``folder`` is empty, and known to all ranks of this host and to nobody else."""
        self._folder = folder
        says = (
            f"fuseline: rank {rank} of {size} has ended without a word: process {os.getpid()} on {socket.gethostname()} "
            "was killed, or has crashed"
        )
        command = ["/bin/sh", "-c", _SCRIPT, "sh", folder, says]
        # In a session of its own, since launchers end whole process groups.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(self.dismiss)

    def dismiss(self) -> None:
        """This rank ends by itself: if others are killed for it, that is no news either."""
        atexit.unregister(self.dismiss)
        with suppress(OSError):
            os.rmdir(self._folder)
        with suppress(OSError):
            self._process.communicate(b"\n")
