"""What holds for all tests, in each of the processes that share them."""

import os
import signal

import pytest

# The models are small, and several processes at work share the cores with their ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup nobody would hear the hang-ups that are tested.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    """Without a GPU kernels run in Triton's interpreter, also in the ranks.

    Triton reads the variable as it is imported, which any of the files that share a process may do first.
    """
    import torch  # reads OMP_NUM_THREADS

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """What a test logged travels as UTF-8, which text that is made to do harm may not be."""
    if isinstance(report, pytest.TestReport):
        plain = [text.encode(errors="backslashreplace").decode() for _, text in report.sections]
        report.sections = [(title, text) for (title, _), text in zip(report.sections, plain, strict=True)]
