"""The rows of a file answered and scored."""
