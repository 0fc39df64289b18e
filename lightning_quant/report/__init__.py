"""What a run leaves behind for people and programs: one record a run, one table a sweep."""
