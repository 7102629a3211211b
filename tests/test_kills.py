"""A run that is killed again and again ends as one that never was, to the bit.

STITCH_THOROUGH=1 kills each of five scripts 50 times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import load_script
from test_runs import assert_same_run, long

THOROUGH = os.environ.get("STITCH_THOROUGH") == "1"

# Imports a script, then runs each command line that it reads in a child of its own: a start takes
# no time so. The child ends at call number `count` that the script makes of what `moment` begins,
# "FUNCTION NAME" with the caller's `name` (of the file that it writes), or after some seconds.
# SIGALRM ends a process that does not handle it as SIGKILL does, between any two instructions.
PARENT = """
import importlib.util, json, os, signal, sys
import gymnasium_robotics, h5py  # which a run imports late

spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
calls = 0

def watch(frame, event, argument):
    global calls
    if event not in ("call", "c_call"):
        return
    inner = event == "c_call"
    name, caller = (argument.__name__, frame) if inner else (frame.f_code.co_name, frame.f_back)
    if caller is not None and caller.f_code.co_filename == script.__file__:
        calls += f"{name} {caller.f_locals.get('name', '')}".startswith(moment)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    argv, moment, count, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # the report alone goes into the pipe
        signal.setitimer(signal.ITIMER_REAL, seconds)
        sys.setprofile(None if seconds else watch)
        code = script.main(argv)
        sys.setprofile(None)
        with open("calls", "w") as file:
            file.write(str(calls))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of one script, each in a process of its own."""

    def __init__(self, name: str):
        self.script = load_script(name)
        with open("errors", "w") as errors:
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            options |= {"text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
            command = [sys.executable, "-c", PARENT, self.script.__file__]
            self.parent = subprocess.Popen(command, **options)

    def __call__(self, folder: str, moment: str = "", count: int = 0, seconds: float = 0) -> int:
        """Begin the run or go on with it; its exit code."""
        argv = ["--run_dir", folder, "--resume", "true"]
        if not Path(folder, "config.yaml").is_file():
            argv = long(self.script, run_dir=folder, resume="true", compile="false", device="cpu")
        order = json.dumps([argv, moment, count, seconds])
        print(order, file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()
        self.parent.stdout.close()


@pytest.fixture
def runs(request):
    """Runs of the script that the test names, of which the one in "whole" is not interrupted."""
    each = Runs(request.param)
    assert each("whole") == 0
    yield each
    each.close()
    assert "Traceback" not in Path("errors").read_text()


MOMENTS = [("write config.yaml", 1), ("env_step", 60), ("write checkpoint.pt", 1)]
MOMENTS += [("log_metrics", 4), ("replace result.json", 1)]  # at update 28, saved at 20; at 40


@pytest.mark.parametrize("runs", ["iql"], indirect=True)
def test_a_run_that_is_killed_where_it_writes_and_plays(runs):
    """In its first write, in an evaluation, in a checkpoint, behind one, in its last write."""
    for moment, count in MOMENTS:
        assert runs("run", moment, count) == -signal.SIGKILL, moment
    assert runs("run") == 0
    assert_same_run("run", "whole")


SPECIAL = ("open", "mkdir", "flock", "truncate", "seek", "write", "fsync", "replace", "env_step")


@pytest.mark.skipif(not THOROUGH, reason="STITCH_THOROUGH=1 asks for it: minutes")
@pytest.mark.parametrize("runs", ["bc", "iql", "cql", "dt", "cal_ql"], indirect=True)
def test_fifty_kills(runs):
    """At any moment, at any call, and at those that touch the disk or the environment."""
    rng, kills, ended, started = random.Random(runs.script.__name__), 0, 0, time.perf_counter()
    assert runs("again") == 0
    most, calls = time.perf_counter() - started, int(Path("calls").read_text())
    while kills < 50:
        special = rng.choice(SPECIAL), rng.randint(1, 12)
        kill = rng.choice((("", 0, rng.uniform(0, most)), ("", rng.randint(1, calls)), special))
        code = runs(f"run{ended}", *kill)
        assert code in (0, -signal.SIGKILL, -signal.SIGALRM), kill
        kills += code != 0
        if code == 0:
            assert_same_run(f"run{ended}", "whole")
            ended += 1
    assert ended > 5
