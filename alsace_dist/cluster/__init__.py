"""Slurm: site profiles, job scripts, the queue."""
