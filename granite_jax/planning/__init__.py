"""What the TPU compiler reports about the programs, and what data sheets allow, without a TPU."""
