"""The command. Before anything else is imported for it, the folder that it happens to run in leaves the path."""

import sys

from compressor.runtime.processes import own_path

sys.path[:] = own_path(sys.path)
