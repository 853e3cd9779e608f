"""What is measured, one question a module; a module is imported only in the process that measures."""
