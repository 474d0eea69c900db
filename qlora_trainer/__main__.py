"""`python -m qlora_trainer`: the command line, where the script `qlora` is not on the path."""

from qlora_trainer.cli.app import main

main()
