"""python -m fm_fast: the command line where the `fm-fast` script is not on the path, and for torchrun."""

import sys

from fm_fast.cli import main

sys.exit(main())
