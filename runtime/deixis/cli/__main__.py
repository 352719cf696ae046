"""`python -m deixis.cli`, the same as the command `deixis`."""

import sys

from deixis.cli import main

sys.exit(main())
