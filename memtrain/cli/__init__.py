"""Reads config, builds objects, calls one room."""

import sys

if sys.platform == "win32":  # here: before anything asks for locks and signals that are not there
    print("error: memtrain runs on Linux and macOS, not on Windows; there, run it in WSL", file=sys.stderr)
    sys.exit(2)
