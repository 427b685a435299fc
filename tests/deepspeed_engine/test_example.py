"""The documented launch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .common import environment, needs

pytestmark = [pytest.mark.peers, needs("accelerate", "transformers")]

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/deepspeed/train.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in environment(0, 1)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150, check=False)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    config = ["--config_file", "examples/deepspeed/accelerate.yaml", "--main_process_port", "0"]
    return run("-m", "accelerate.commands.launch", *config, SCRIPT, *arguments)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_it_learns(optimizer: str, operators: None) -> None:
    done = launch("--optimizer", optimizer, "--epochs", "3", "--lr", {"adamw": "1e-2", "lion": "3e-3"}[optimizer])
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss ([\d.]+),", done.stdout, re.M)]
    assert len(losses) == 3  # of the first process only
    assert losses[-1] < losses[0] / 2
    assert re.search(r"^2 processes; (AdamW|Lion), 1 tensors on cpu \(p float32", done.stdout, re.M)


def test_it_refuses(operators: None) -> None:
    done = launch("--optimizer", "lamb")
    assert done.returncode != 0
    assert "ValueError: LAMB under ZeRO stage 2: its step looks at whole tensors" in done.stderr


def test_started_without_the_launcher() -> None:
    done = run(SCRIPT)
    assert done.returncode == 1
    assert "DeepSpeed is not in use" in done.stderr
