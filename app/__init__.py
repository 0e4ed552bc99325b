"""The chat page and its endpoint. `engine`, `lane`, `chat` and `backend` know nothing of Gradio: tested alone."""
