"""Programs that feed an exported network and read its answers, written into its bundle."""
