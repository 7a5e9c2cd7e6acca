"""`python -m llava15_fast` is the command `llava15-fast`."""

import sys

from .tools.cli import main

sys.exit(main())
