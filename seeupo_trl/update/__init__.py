"""The backward-ordered update of one iteration: Algorithm 1 of arXiv 2602.06554, and the equations it is made of."""
