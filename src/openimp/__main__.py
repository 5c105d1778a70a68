"""`python -m openimp`, which torchrun needs."""

from openimp.cli import main

main()
