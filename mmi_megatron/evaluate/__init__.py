"""Tasks and metrics."""
