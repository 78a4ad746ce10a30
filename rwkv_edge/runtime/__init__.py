"""What runs on the device: sessions, sampling and the step loop. Imports numpy and the chosen backend, nothing else."""
