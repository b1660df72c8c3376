"""`python -m tests.support.slow_to_end`: the program, which as the first task of SLURM takes a second longer to end.

As it does when W&B uploads.
"""

import atexit
import os
import time

from memtrain.cli.main import main

if __name__ == "__main__":
    if os.environ["SLURM_PROCID"] == "0":
        atexit.register(time.sleep, 1)
    main()
