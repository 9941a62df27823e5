"""Processes that tests start: what they can import, and whether they are gone."""

import os
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(*folders: Path) -> dict[str, str]:
    """This process's, with which the project, `folders` and what this process was given to import can be imported."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, folders), *inherited])}


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the two ranks, as soon as both have written theirs into a file `rank...`."""
    deadline = time.monotonic() + 240  # a loaded machine imports torch slowly
    while time.monotonic() < deadline:
        ranks = [int(text) for text in map(Path.read_text, folder.glob("rank*")) if text]
        if len(ranks) == 2:
            return ranks
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    """Whether they are, within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_alive, pids)):
        time.sleep(0.05)
    return not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and waits for its parent to take notice is not alive.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
