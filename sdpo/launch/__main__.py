"""`python -m sdpo.launch RUN/config.yaml`: a whole run, or one rank of it under torchrun."""

from sdpo.launch.local import main

main()
