"""`python -m seeupo_trl` is the command `seeupo-trl`."""

from seeupo_trl.command_line.main import main


main()
