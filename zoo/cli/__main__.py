"""`python -m zoo.cli`, where the command `zoo` is not on the path."""

from zoo.cli.main import main

main()
