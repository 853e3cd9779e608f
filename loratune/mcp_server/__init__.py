"""The MCP server: tools for agents, each of which runs a command of loratune within bounds."""
