"""`python -m quest` is the command `quest`."""

import sys

from quest.cli import main

sys.exit(main())
