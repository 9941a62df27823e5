"""The ranks of `test_faults_gpu`: `python -m faulty_ranks FAULT FILE +recipe=...`; rank 1 fails in step 6, once."""

import os
import signal
import sys
import time
from pathlib import Path

from moe_trainer.cli import train


def fail_in_step(step: int, fault: str, file: Path) -> None:
    from moe_trainer.train.trainer import Trainer

    real = Trainer.train_step

    def train_step(trainer: Trainer, batch: object) -> object:
        if os.environ["RANK"] == "1" and trainer.state.step + 1 == step and not file.exists():
            file.touch()
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
        return real(trainer, batch)

    Trainer.train_step = train_step


if __name__ == "__main__":
    fail_in_step(6, sys.argv[1], Path(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))
