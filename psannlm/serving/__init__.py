"""The HTTP server of `psannlm serve`: an OpenAI-compatible API over the generation engine, and a web page."""
