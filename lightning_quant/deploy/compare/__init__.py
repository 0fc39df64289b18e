"""Two bundles of one network compared: what became worse, and by how much, within bounds of the user's."""
