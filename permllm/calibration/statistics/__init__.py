"""What a pruner or a reconstruction may ask of the calibration text: a statistic is a class, in a module of its own."""
