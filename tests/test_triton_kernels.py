"""The Triton kernels without a GPU: run by Triton's interpreter and put through its compiler, each in a process of its own.

Where there is a GPU the same cases run on it.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform; on Linux it comes with the dev extra")

TESTS = pathlib.Path(__file__).parent


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=TESTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1", **environment},
    )


def test_every_case_holds_in_the_interpreter_or_on_the_device():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    shown = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / "triton_cases.py"), **interpret)
    assert shown.returncode == 0, shown.stdout[-4000:] + shown.stderr[-2000:]


def test_every_kernel_compiles_for_devices_that_are_not_here(tmp_path):
    shown = run(str(TESTS / "triton_offline.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-4000:]
    kernels = {line.split()[0] for line in shown.stdout.splitlines()}
    assert kernels == {f"{name}_kernel" for name in ("fill", "axpy", "project", "spread", "fused", "contract")}
