"""The parent process: it starts the engine and the API workers, watches them, and ends them in order."""
