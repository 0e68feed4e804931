"""``python -m layerdrop_fast``: the command line."""

import sys

from layerdrop_fast.cli import main

sys.exit(main())
