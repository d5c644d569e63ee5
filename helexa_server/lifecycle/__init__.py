"""What becomes of the models of a server over time."""
