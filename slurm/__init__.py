"""Submit a recipe to a Slurm cluster: check its settings, freeze the source, write the job script, queue it."""

import recipes  # noqa: F401 -- it prints the first line while the other modules are imported
