"""What loratune knows of a model's architecture: its structure, the roles of its modules, its names in the files."""
