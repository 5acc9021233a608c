"""The arithmetic in plain PyTorch: what "correct" means. Readable, never optimised; papers are cited."""
