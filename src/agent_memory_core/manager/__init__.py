"""Several models in one memory: who is loaded, who makes room for whom, and who waits."""
