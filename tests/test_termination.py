"""Ending when asked to, in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# What a background process inherits, it would ignore.
BEGIN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from osft.process import termination
from osft.process.termination import *
"""
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
READY = "print('ready', flush=True)\n"


@contextmanager
def program(code: str, *arguments: str, first: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A program that has said that it is ready."""
    command = [*first, sys.executable, "-c", BEGIN + textwrap.dedent(code), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str], *signals: signal.Signals, seconds: float = 4.0) -> tuple[int, str]:
    """Exit code and the rest of what was printed, after signals 0.1 s apart."""
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output + errors


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_program_ends_with_the_signals_code(signum, code):
    with program(f"""
        end_when_asked()
        try:
            {READY.strip()}
            time.sleep(60)
        except KeyboardInterrupt: sys.exit(130)
    """) as process:
        assert end_of(process, signum)[0] == code


def test_cleaning_up_is_not_cut_off_by_being_asked_again():
    with program(f"""
        end_when_asked()
        try:
            {READY.strip()}
            time.sleep(60)
        finally:
            time.sleep(0.6)
            print("cleaned up")
    """) as process:
        assert end_of(process, *[signal.SIGTERM] * 3, signal.SIGINT) == (143, "cleaned up\n")


@pytest.mark.parametrize(
    "code",
    ["import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", "import threading; threading.Lock().acquire()"],
    ids=["foreign code", "a lock"],
)
def test_what_hangs_is_left_behind(code):
    locked = "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()"
    with program(f"end_when_asked()\n{READY}{locked if 'Lock' in code else code}") as process:
        assert end_of(process, signal.SIGTERM)[0] == 143


def test_code_that_swallows_the_exception_is_left_behind():
    with program(f"""
        termination._LEAVING_SECONDS = 0.3
        end_when_asked()
        while True:
            try:
                {READY.strip()}
                time.sleep(1)
            except BaseException: pass
    """) as process:
        code, printed = end_of(process, signal.SIGTERM)
        assert code == 143
        assert printed.endswith("osft: ended by SIGTERM\n")


def test_process_1_of_a_container_ends_too():
    """Without a handler, process 1 would not even notice."""
    with program(f"end_when_asked()\n{READY}assert os.getpid() == 1\ntime.sleep(60)", first=UNSHARE) as unshare:
        (first,) = psutil.Process(unshare.pid).children()
        first.send_signal(signal.SIGTERM)
        assert unshare.wait(4) == 143


def test_forked_process_that_is_asked_is_not_its_parent():
    with program(f"""
        end_when_asked()
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        {READY}
        time.sleep(1.5)
        print("here")
    """) as process:
        assert end_of(process) == (0, "here\n")


def test_interrupt_that_the_caller_ignores_stays_ignored():
    with program(f"""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_when_asked()
        {READY}
        time.sleep(0.5)
    """) as process:
        assert end_of(process, signal.SIGINT)[0] == 0


WORKER = """
import signal, sys, time
times = []
signal.signal(signal.SIGTERM, lambda *_: times.append(1))
print("ready", flush=True)
while not times or "stays" in sys.argv: time.sleep(0.05)
time.sleep(0.5)
print("asked", len(times), "times", flush=True)
"""

PASSING = f"""
import subprocess
if "program" in sys.argv: end_when_asked()
def workers(): return [worker.pid] if worker.poll() is None else []
before = signal.getsignal(signal.SIGTERM)
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, *sys.argv[1:]], start_new_session=True)
with passing_on(workers, patience_seconds=0.5 if "stays" in sys.argv else 60) as asked:
    code = worker.wait()
    print(code, asked(), flush=True)
assert signal.getsignal(signal.SIGTERM) == before
"""


@pytest.mark.parametrize("kind", ["program", "library"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_once_and_the_end_of_the_workers_is_waited_for(kind, signum):
    with program(PASSING, kind) as process:
        assert end_of(process, *[signum] * 3) == (0, f"asked 1 times\n0 {int(signum)}\n")


def test_worker_that_does_not_end_in_time_is_killed():
    with program(PASSING, "library", "stays") as process:
        assert end_of(process, signal.SIGTERM) == (0, f"-9 {int(signal.SIGTERM)}\n")


@pytest.mark.parametrize("kind", ["program", "library"])
def test_waiting_for_workers_that_are_not_there_yet_ends_at_once(kind):
    with program(f"""
        if {kind!r} == "program": end_when_asked()
        with passing_on(lambda: [], patience_seconds=60):
            {READY.strip()}
            time.sleep(60)
    """) as process:
        assert end_of(process, signal.SIGTERM)[0] == 143


def test_signals_do_what_they_did_after_a_librarys_run():
    with program(f"""
        with passing_on(lambda: [], patience_seconds=60): pass
        {READY}
        time.sleep(60)
    """) as process:
        assert end_of(process, signal.SIGTERM)[0] == -signal.SIGTERM


def test_only_children_that_run_the_module_are_found():
    with program(f"""
        import subprocess
        one = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)", "a.module"])
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)", "b.module"])
        time.sleep(0.2)
        assert children(running="a.module") == [one.pid]
        one.kill(), other.kill()
        {READY}
    """) as process:
        assert end_of(process)[0] == 0


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getppid() + 1", 143), ("None", 0)])
def test_process_whose_parent_died_before_it_could_tell_ends(parent, code):
    with program(f"from osft.process.termination import end_with_parent\n{READY}end_with_parent({parent})") as process:
        assert end_of(process)[0] == code
