"""Where a rank was when it was told to end: its step, the line of code, and its last collective.

Each rank leaves one small file in the launcher's folder; the launcher shows them all when ranks waited for each other
in vain, because the rank that is told of in an error is seldom the one that was late.
"""

import faulthandler
import json
import os
import pickle
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

NCCL_DUMP = "nccl_rank"
"""Beginning of the name, before the rank, of what NCCL's flight recorder leaves when a collective times out."""
_SECONDS_TO_UNWIND = 0.5
_SECONDS_TO_END = 4.0
_OWN_LINE = re.compile(
    r'moe_trainer/(?:train|optim|parallel|models|kernels|data)/.*?(?P<file>\w+\.py)", '
    r"line (?P<line>\d+) in (?P<name>\w+)"
)
"""Of faulthandler."""


def leave_on_sigterm(folder: Path | None) -> None:
    """From now on SIGTERM ends this process within five seconds, even while it is stuck in a collective.

    In Python code it raises SystemExit, so that files and sinks are closed. Python runs no handler while its main
    thread waits in C++ (for a collective or a GPU); the file descriptor that the signal wakes tells another thread.

    Args:
        folder: where to leave `rankN.json`; None leaves nothing.
    """
    heard: list[int] = []

    if folder is not None:
        # For what ends a process from within, such as NCCL's own time-out: a list of its threads and their lines.
        faulthandler.enable((folder / f"rank{os.environ.get('RANK', '0')}.stack").open("w"))

    def leave(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        if folder is not None and frame is not None:
            note_whereabouts(folder, traceback.extract_stack(frame))
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    main = threading.get_ident()

    def watch() -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        clock = threading.Event()
        clock.wait(_SECONDS_TO_UNWIND)
        if not heard and folder is not None and main in sys._current_frames():
            note_whereabouts(folder, traceback.extract_stack(sys._current_frames()[main]))
        clock.wait(_SECONDS_TO_END)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="leave_on_sigterm", daemon=True).start()


def note_whereabouts(folder: Path, stack: traceback.StackSummary) -> None:
    """Leave `rankN.json` in `folder`, unless it is there: the first note is nearest to what happened."""
    path = folder / f"rank{os.environ.get('RANK', '0')}.json"
    own = [entry for entry in stack if f"{os.sep}moe_trainer{os.sep}" in entry.filename]
    own = [entry for entry in own if "whereabouts" not in entry.filename]
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "outside of moe_trainer"
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump({"where": f"{where} ({stack[-1].name})", "collective": _last_collective()}, file)
    except OSError:
        pass


def describe_ranks(folder: Path, world_size: int) -> list[str]:
    """A line for each rank: its step, where it was, its last collective."""
    lines = []
    for rank in range(world_size):
        step = _read(folder / f"rank{rank}.step") or "not begun"
        try:
            note = json.loads(_read(folder / f"rank{rank}.json") or "{}")
        except ValueError:
            note = {}
        if "where" not in note and (match := _OWN_LINE.search(_read(folder / f"rank{rank}.stack"))):
            note["where"] = f"{match['file']}:{match['line']} {match['name']}"
        if not note.get("collective"):
            note["collective"] = _described(_dumped(folder / f"{NCCL_DUMP}{rank}"))
        last = f", last collective {note['collective']}" if note.get("collective") else ""
        lines.append(f"  rank {rank}: step {step}, at {note.get('where', 'an unknown place')}{last}")
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _last_collective() -> str | None:
    """From PyTorch's flight recorders, where they are on: name, number and group."""
    if "torch" not in sys.modules:
        return None
    from torch._C import _distributed_c10d as c10d

    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL has one of its own; the other is gloo's
        try:
            entries += json.loads(getattr(c10d, name)())["entries"]
        except Exception:  # another version, another recorder, none: it is only a hint
            continue
    return _described(entries)


def _described(entries: list[dict[str, Any]]) -> str | None:
    try:
        last = max(entries, key=lambda entry: entry["time_created_ns"])
        name, number = last["profiling_name"], last["collective_seq_id"]
        return f"{name} #{number} of {last['process_group'][1] or last['process_group'][0]}, {last['state']}"
    except (ValueError, LookupError, TypeError):
        return None


class _PlainUnpickler(pickle.Unpickler):
    """Of numbers, texts and what holds them, which is all that a flight recorder writes."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def _dumped(path: Path) -> list[dict[str, Any]]:
    """What NCCL wrote before it ended the process."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()["entries"]
    except Exception:  # none, or one that was cut short, which raises almost anything
        return []
