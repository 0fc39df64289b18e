"""Breaking the package for real: kills, faults, odd numbers, endurance. `make torture` runs all of it."""
