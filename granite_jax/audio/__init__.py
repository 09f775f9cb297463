"""Converts audio in any form to float32 samples at 16 kHz."""
