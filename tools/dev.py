# SPDX-License-Identifier: Apache-2.0
"""Entry of the developer commands: ``python3 tools/dev.py demo``, ``python3 tools/dev.py test``.

This file only checks the interpreter, in syntax that every Python version understands.
environment.py makes .venv, and noxfile.py defines the tasks.
"""

import sys

OLDEST = (3, 10)
NEWEST = (3, 14)

if not OLDEST <= sys.version_info[:2] <= NEWEST:
    sys.exit(
        "error: expected Python {0[0]}.{0[1]} to {1[0]}.{1[1]}, which torch 2.13.0 (needed by "
        "torchopt) supports; got Python {2[0]}.{2[1]} at {3}; run this command with another "
        "one, for instance python3.11 tools/dev.py {4}".format(
            OLDEST, NEWEST, sys.version_info, sys.executable, " ".join(sys.argv[1:])
        )
    )

from environment import main  # noqa: E402  (the version check comes first)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
