"""The command: parsing, printing, exit statuses."""

import sys

from compressor.runtime.processes import own_path

sys.path[:] = own_path(sys.path)  # before anything else is imported for it
