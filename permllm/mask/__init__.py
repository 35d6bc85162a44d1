"""Methods that choose the masks, one module for each option of the group `mask`."""
