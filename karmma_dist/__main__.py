"""The entry point of `python -m karmma_dist`, which launchers start on every rank; it is `karmma-dist`."""

import sys

from karmma_dist.cli import main

sys.exit(main())
