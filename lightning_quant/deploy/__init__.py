"""From the simulation to files a device's compiler takes, and the proof that they compute the same."""
