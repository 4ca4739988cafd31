"""Starting ranks: here with torchrun, or on a cluster through sbatch. Nothing here runs inside a rank."""
