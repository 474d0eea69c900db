"""Run the command line by `python -m qlora_trainer`, where the script `qlora` is not on the path."""

from qlora_trainer.cli.app import main

main()
