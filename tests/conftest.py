"""What holds for all tests, in each of the processes that share them."""

import os
import signal

import pytest

# The models are small, and several processes at work share the cores with their ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup nobody would hear the hang-ups that are tested.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """What a test logged travels as UTF-8, which text that is made to do harm may not be."""
    if isinstance(report, pytest.TestReport):
        plain = [text.encode(errors="backslashreplace").decode() for _, text in report.sections]
        report.sections = [(title, text) for (title, _), text in zip(report.sections, plain, strict=True)]
