"""What a run needs in memory, before it is started: `python -m seeupo_trl.plan`."""
