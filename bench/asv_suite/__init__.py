"""The asv suite: our own operations over commits, on the cases of `fastlocal bench`."""
