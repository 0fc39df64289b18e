"""Where two computations of one network part ways: which layer, by how much, and why."""
