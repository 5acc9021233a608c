"""The one door to the arithmetic: check the arguments, choose an implementation, call it."""
