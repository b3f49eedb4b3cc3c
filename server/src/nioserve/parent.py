"""The tie of a child process to its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_ENV = "NIOSERVE_PARENT_PID"
"""Set by the supervisor for its children: the pid they must be children of."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the supervisor ends, however it ends; no orphan keeps the port."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call: then nobody is left to send the signal.
    if os.getppid() != int(os.environ.get(PARENT_ENV, os.getppid())):
        sys.exit(1)
