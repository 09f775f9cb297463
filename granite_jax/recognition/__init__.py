"""What is done with audio: recognizers, word times, guards, recordings."""
