"""Options of the Hydra groups. Hydra finds them by `hydra.searchpath=[pkg://mypackage.conf]`."""
