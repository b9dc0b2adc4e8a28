"""The commands: thin, one file per group. Heavy imports are inside the functions, so that `--help` stays fast."""
