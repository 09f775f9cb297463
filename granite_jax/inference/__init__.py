"""Batched inference: compiled programs, the engine that feeds them, and the Transcriber in front."""
