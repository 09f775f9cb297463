"""What the TPU compiler reports about the programs, without a TPU."""
