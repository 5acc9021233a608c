"""The microbenchmarks behind `fastlocal bench`: cases, peers, byte counts and timing. Needs no more than torch."""
