"""What became of episodes, and what an evaluation reports about them."""
