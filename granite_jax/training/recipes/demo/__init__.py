"""The recipe of the embedded checkpoint."""
