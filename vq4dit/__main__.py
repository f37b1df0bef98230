"""`python -m vq4dit`."""

import sys
import warnings

from vq4dit.extras import of_extra

if not sys.warnoptions:  # packages warn programmers; who uses a command can do nothing about it
    warnings.simplefilter("ignore")
with of_extra("cli", "the command line"):
    from vq4dit.cli import main

sys.exit(main())
