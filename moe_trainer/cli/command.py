"""What the commands share: exit codes, who speaks, and what the environment says about ranks and GPUs."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from moe_trainer.cli.launch import end_with_parent, launch_folder, report_to_launcher, was_launched
from moe_trainer.cli.whereabouts import leave_on_sigterm, note_whereabouts
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.errors import ConfigError, printable

_OF_PATHS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip
"""What a person mends, and another start does not."""


def run_command(name: str, body: Callable[[], int]) -> int:
    """The exit code of `body`: 2 and one line on stderr for the user's mistake, 130 for Ctrl-C.

    A path that cannot be used is a mistake too, wherever it shows: one too long or forbidden, a disk that is full.
    Of several ranks one speaks: under `launch` the launcher does, under another torchrun rank 0.
    """
    before = signal.getsignal(signal.SIGTERM)
    if was_launched():
        end_with_parent()
        leave_on_sigterm(launch_folder())
    else:
        signal.signal(signal.SIGTERM, _leave)
    try:
        code = body()
        if was_launched():
            # All is written and closed. What Python takes apart from here on can still abort a rank of a good run:
            # now and then a thread of PyTorch's runs on.
            _end_at_once(code)
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (mistake := _mistake(error)) is not None:
            line = f"{name}: {' '.join(mistake.split())}"
            if was_launched():
                report_to_launcher(line)
            elif is_first_rank() or (_is_in_a_group() and not isinstance(error, ConfigError)):  # of this rank alone
                print(line, file=sys.stderr)
            _leave_others_alone(2)
            return 2
        folder = launch_folder()
        if folder is not None:
            note_whereabouts(folder, traceback.extract_tb(error.__traceback__))
        if was_launched():
            report_to_launcher(traceback.format_exc())
        elif _is_in_a_group():
            traceback.print_exc()
        _leave_others_alone(1)
        if was_launched():
            return 1
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _mistake(error: Exception) -> str | None:
    """What to say of it, if it is one that a person makes."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _OF_PATHS:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return None


def _leave_others_alone(code: int) -> None:
    """End this process at once if it is one of several ranks that have met; they may be in a collective.

    gloo's threads abort a process that unloads them while its group is in a collective, and NCCL waits for the rest.
    """
    if _is_in_a_group():
        _end_at_once(code)


def _end_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_in_a_group() -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def world_size_from_env() -> int | None:
    """Number of ranks under torchrun; None elsewhere."""
    return _number("WORLD_SIZE") if "RANK" in os.environ else None


def local_world_size_from_env() -> int | None:
    """Number of this machine's ranks under torchrun; None elsewhere."""
    return _number("LOCAL_WORLD_SIZE") if "RANK" in os.environ else None


def count_gpus(device: DeviceName) -> int:
    """Ranks that this machine has GPUs for; 0 for `device=cpu`, which spares the import of torch."""
    if device is DeviceName.cpu:
        return 0
    from moe_trainer.parallel.gpus import count_places

    return count_places()


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"the environment variable {name}={text} must be a number")
    return None if text is None else int(text)


def _leave(signum: int, frame: FrameType | None) -> None:
    # As an exception, so that open files and metric sinks are closed on the way out.
    raise SystemExit(128 + signum)
