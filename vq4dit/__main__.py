"""`python -m vq4dit`."""

import sys

from vq4dit.cli import main

sys.exit(main())
