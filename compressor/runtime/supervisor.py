"""A command in a process that its parent watches: however it ends, there is a status that says why.

Want of memory does not always become an exception. The kernel kills, C++ aborts, a loader that cannot allocate exits
with 127, and a library that gets no thread with 1, which would say that a gate failed. So a command runs in a fork of
the process that was started; what that reports counts, and any other end is told as what it is. Signals go on to it.

It ends with its parent, and a worker's parent with the batch: killed, neither could end what it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from compressor.core.machine import is_scarce
from compressor.core.terminal import occupy_descriptors

GRACE_SECONDS = 10.0
"""From an interrupt, which a run ends on resumably, to the end by force."""
RESOURCES, BUG, INTERRUPTED = 4, 5, 130
HELP_OPTIONS = frozenset({"--help", "-h", "--version"})
"""With any of them a command does too little to be watched."""
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def supervised(command: Callable[[], None]) -> None:
    """Runs a command, which ends by SystemExit, in a fork; exits with its status. In this process where none can be."""
    if not hasattr(os, "fork") or not hasattr(signal, "sigwaitinfo") or threading.active_count() > 1:
        command()
        return
    numbers = {getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)} | {signal.SIGCHLD}
    parent = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started us may ignore it, and then nothing waits
    occupy_descriptors()
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        child = os.fork()
    except OSError:  # no memory or no process for a second one
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        command()
        return
    if child:
        os.close(writing)
        os._exit(_watch(child, reading, numbers))
    os.close(reading)
    _end_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = BUG
    try:
        command()
    except SystemExit as ended:
        status = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else BUG
        raise
    except KeyboardInterrupt:  # before the command could say what it does with one
        status = INTERRUPTED
        sys.exit(status)
    finally:
        os.write(writing, bytes([status & 255]))


def _watch(child: int, reading: int, numbers: set[signal.Signals]) -> int:
    """The child's status, and where it did not report one, the status that its end means."""
    while True:
        found = signal.sigwaitinfo(numbers)
        if found.si_signo == signal.SIGCHLD:
            ended, how = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if not ended:
                continue
            if os.WIFSTOPPED(how):  # Ctrl-Z, which this process has received as well
                continue
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, found.si_signo)  # once more, where it came from the terminal
    reported = os.read(reading, 1)
    if reported:  # whatever a library then does while the process ends
        return reported[0]
    code = os.waitstatus_to_exitcode(how)
    if -code in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        return INTERRUPTED
    status, message = _meaning(code)
    with contextlib.suppress(OSError, AttributeError):
        os.write(2, f"Error: {message}\n".encode())
    return status


def _meaning(code: int) -> tuple[int, str]:
    """What an end means that no command makes by itself."""
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        how = f"the process was ended by {name}"
    else:
        how = f"a library ended the process with status {code}"
    if code == -signal.SIGKILL or _is_limited():
        advice = "take a machine with more, or see --dry-run for what a run needs"
        return RESOURCES, f"{how}; memory is too little, most likely; {advice}"
    return BUG, f"{how}; please report it with the command, and with the file where that may be shared"


def _is_limited() -> bool:
    """Whether memory is scarce: this process may not have all that there is, or there is little left."""
    import resource

    limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True  # what the command took of it is gone with it
    try:
        return is_scarce()
    except (ImportError, OSError, MemoryError):
        return True


def _end_with(parent: int) -> None:
    """Lets this process be killed when its parent is, where the system can do that."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was killed meanwhile
        os._exit(INTERRUPTED)


def end_with_stdin() -> None:
    """Interrupts this process once its stdin, a pipe from who started it, is closed; ends it where it goes on."""
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    try:
        while os.read(0, 1024):
            pass
    except OSError:
        return  # no pipe: nobody to follow
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(INTERRUPTED)
