"""Methods that choose the linears to prune: the options of the group `allocation`."""
