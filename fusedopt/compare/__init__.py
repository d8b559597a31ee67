"""`fusedopt compare`: optimizers × schedules × seeds (× batch sizes) on one task."""
