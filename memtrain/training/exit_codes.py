"""What a run that a signal ends tells the scheduler. Imports nothing, for processes that only wait for runs."""

import signal

AGAIN = 75  # EX_TEMPFAIL: start me again
EXIT_CODES = {
    signal.SIGUSR1: AGAIN,
    signal.SIGUSR2: AGAIN,  # submitit's
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
}
