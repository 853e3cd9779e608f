"""Every setting, declared once: sections, loading from YAML and flags, advice."""
