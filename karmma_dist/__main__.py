"""`python -m karmma_dist` is `karmma-dist`: what a launcher starts on every rank."""

import sys

from karmma_dist.cli import main

sys.exit(main())
