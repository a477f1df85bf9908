"""Saved trajectories as one HTML page: `python -m seeupo_trl.view`."""
