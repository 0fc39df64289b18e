"""What a run leaves behind for people and programs: one record per run, one table per sweep."""
