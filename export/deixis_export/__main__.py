import sys

from deixis_export.cli import main

sys.exit(main())
