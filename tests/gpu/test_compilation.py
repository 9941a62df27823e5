"""Triton's compiler and NVIDIA's assembler take every kernel, for Hopper; no GPU is needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

MOST_SHARED = 227 * 1024
"""Bytes that a program can have on Hopper."""


def launched() -> set[tuple[str, str]]:
    """(module, kernel) of each `_kernel[grid](...)` in the sources."""
    calls = {
        (path.stem, node.func.value.id)
        for path in (ROOT / "moe_trainer" / "kernels" / "gpu").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    assert ("grouped_gemm", "_multiply") in calls
    return calls


def test_every_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(kernel["module"], kernel["name"]) for kernel in kernels} == launched()
    for kernel in kernels:
        print(kernel)
        assert kernel["shared"] <= MOST_SHARED, kernel
