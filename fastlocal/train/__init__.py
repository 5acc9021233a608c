"""The trainer: measures on CIFAR-100 what each method costs in accuracy and saves in bytes."""
