"""What a study found, as plain data, and the files of a run directory."""
