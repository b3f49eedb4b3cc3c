"""HTTP: OpenAI routes, health, chat page. JSON and chat templates live here and nowhere else."""
