"""Python code in a process of its own, without the seconds that it takes to import torch: a copy of one that has imported it."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

DEADLINE = 600  # seconds, so that code that hangs fails its test
COPIES = """
import atexit, json, os, signal, sys, traceback
import torch

for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    task = json.loads(line)
    for number, file in enumerate(task["streams"]):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.stdin = open(0)
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.path[:0] = task["path"]
    sys.argv[1:] = task["arguments"]
    signal.alarm(task["deadline"])
    status = 0
    try:
        exec(task["code"], {"__name__": "__main__"})
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # without a second of taking torch apart
"""


@functools.cache
def _original() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", COPIES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_python(code, *arguments, folder=".", path=(), typed="", **environment) -> subprocess.CompletedProcess[str]:
    """Run code with sys.argv[1:] = arguments, ``path`` before sys.path, further variables, and what is typed on stdin."""
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place, name) for name in ("stdin", "stdout", "stderr")]
        for file, text in zip(streams, (typed, "", ""), strict=True):
            file.write_text(text)
        task = {"code": code, "arguments": [*map(str, arguments)], "streams": [*map(str, streams)], "deadline": DEADLINE}
        task |= {"folder": os.path.abspath(folder), "path": list(path), "environment": {**os.environ, **environment}}
        print(json.dumps(task), file=_original().stdin, flush=True)
        status = int(_original().stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in streams[1:]))


def two_processes(work, arguments):
    """work(rank, *arguments) in each of two processes."""
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])
    processes = torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver", join=False)
    assert processes is not None
    end = time.monotonic() + DEADLINE
    while not processes.join(timeout=5):  # raises what a process has raised
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"two processes: one waits for the other, or both took more than {DEADLINE} s")
