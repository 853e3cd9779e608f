"""Parts of the script that builds tiny-qwen, the small practice model of loratune."""
