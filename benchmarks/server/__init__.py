"""What the server itself costs, over an engine that costs next to nothing."""
