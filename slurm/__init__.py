"""Submit a recipe to a Slurm cluster: check its settings, freeze the source, write the job script, queue it."""
