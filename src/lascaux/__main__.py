"""`python -m lascaux` and `torchrun -m lascaux`."""

from lascaux.cli import main

main()
