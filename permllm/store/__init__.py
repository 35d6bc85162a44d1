"""Writers of a run: directory, files, tensors, cache, environment, loggers, sweeps."""
