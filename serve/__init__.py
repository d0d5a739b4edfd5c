"""A service around the runtime: HTTP in the shape of the OpenAI images API, and a page that generates as you type."""
