"""The domains, a file each."""
