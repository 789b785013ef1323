"""`python -m compressor`: the command. Without -P, Python puts the folder that it runs in first on the path."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():
    del sys.path[0]

from compressor.cli.commands import main

if __name__ == "__main__":
    main()
