"""``python -m alsace_dist``: the same as the command ``alsace``; torchrun starts the ranks through it."""

from alsace_dist.cli import main

main()
