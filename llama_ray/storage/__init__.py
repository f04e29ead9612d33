"""Files and directories: the user's paths, atomic writes, local and remote storage, the checkpoints of runs."""
