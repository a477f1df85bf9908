"""The command `seeupo-trl`: training, evaluation, plans, pages of trajectories, and a look at the installation."""
