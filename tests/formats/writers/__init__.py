"""One file per trainer; each trains a tiny policy with that trainer's own code and saves it with its own writer."""
