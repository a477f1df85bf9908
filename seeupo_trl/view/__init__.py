"""A run and its saved trajectories as one HTML page: `python -m seeupo_trl.view`."""
