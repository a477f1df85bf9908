"""Log-probabilities of turns under a policy, each shared token computed once."""
