"""A step after a fork: OpenMP's threads do not come along."""

from __future__ import annotations

import os
import subprocess
import sys

from .common import needs_compiler

CODE = """
import os, sys, threading, time
import torch, lightning_optim
from lightning_optim.engines.host import threads

def optimizer():
    params = [torch.nn.Parameter(torch.zeros(200_000)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return lightning_optim.AdamW(params, engine="host")

def child_does(what):
    pid = os.fork()
    if pid == 0:
        try:
            what()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "ok" if status == 0 else "failed"
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"

def expect(count):
    assert threads.thread_count() == count, threads.thread_count()

def worker():  # of a DataLoader
    torch.set_num_threads(1)
    expect(1)
    opt.step()

def torchrun():
    os.environ.update(OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="x")
    worker()

def bare():
    del os.environ["LIGHTNING_OPTIM_THREADS"]
    expect(2)
    opt.step()
    optimizer().step()  # torch's own operators, too

def grandchild():
    opt.step()
    assert child_does(worker) == "ok"
    assert child_does(bare) == "ok"
    opt.step()

def thread():
    failed = []
    def run():
        try:
            opt.step()
        except BaseException as error:
            failed.append(error)
    runner = threading.Thread(target=run)
    runner.start()
    runner.join()
    assert not failed

def bereft():  # where the runtime cannot send its threads home
    expect(1)
    opt.step()
    found = []
    runner = threading.Thread(target=lambda: found.append(threads.thread_count()))
    runner.start()
    runner.join()
    assert found == [2]  # a thread that is started after the fork has helpers of its own

torch.set_num_threads(2)
opt = optimizer()
opt.step()
for what in (worker, torchrun, bare, grandchild, thread):
    print(what.__name__, child_does(what), flush=True)
    opt.step()  # the parent goes on
threads._pause = lambda: None
opt.step()
print("bereft", child_does(bereft))
expect(2)
"""


@needs_compiler
def test_a_step_after_a_fork_never_hangs() -> None:
    environment = {**os.environ, "LIGHTNING_OPTIM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    names = ("worker", "torchrun", "bare", "grandchild", "thread", "bereft")
    assert done.stdout.splitlines() == [f"{name} ok" for name in names], done.stderr
