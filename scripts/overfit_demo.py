"""The main job end to end, on 4 processes: `python scripts/overfit_demo.py [--nproc N]`."""

import sys

from moe_trainer.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
