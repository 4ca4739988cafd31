"""Launching: starts ranks on this machine, or on a cluster through sbatch. Nothing here runs inside a rank."""
