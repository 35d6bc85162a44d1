"""The run directory, the cache, loggers, sweeps; tables and pictures of many runs."""
