"""`python -m sdpo.launch RUN/config.yaml`: a whole run, one node's part of it, or one rank of it under torchrun."""

import sys

from sdpo.errors import UserError
from sdpo.launch.local import main

try:
    main(sys.argv[1:])
except UserError as error:
    sys.exit(f"error: {error}")
