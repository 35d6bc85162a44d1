"""Methods that change kept weights, one module for each option of the group."""
