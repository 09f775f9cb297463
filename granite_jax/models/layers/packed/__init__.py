"""The same layers over rows packed side by side: a schedule for inference that computes no padding."""
