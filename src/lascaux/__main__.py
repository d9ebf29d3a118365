"""`python -m lascaux`."""

from lascaux.cli import main

main()
