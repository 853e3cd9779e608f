"""The subcommands of scripts/benchmark."""
