"""`python -m lm.serve` is `lm-serve`."""

from lm.serve import main

main()
