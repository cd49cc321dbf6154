"""HTTP in front: the ASGI application, its exchanges, and the routes that speak as OpenAI's API does."""
