"""Methods that permute channels, one module for each option of the group `permutation`."""
