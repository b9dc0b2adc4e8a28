"""The commands: thin, one file a group; heavy imports stand inside the functions so that `--help` stays light."""
