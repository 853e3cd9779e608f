"""What loratune knows of model architectures: structure, roles of modules, and names in files."""
