"""What a run that ends tells the scheduler. Imports nothing, for processes that only wait for runs."""

import signal

AGAIN = 75  # EX_TEMPFAIL: start me again
INCOMPLETE = 3  # trained and exported, but a picture, the report or another look failed: see run.log
EXIT_CODES = {
    signal.SIGUSR1: AGAIN,
    signal.SIGUSR2: AGAIN,  # submitit's
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
}
