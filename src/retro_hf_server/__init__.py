"""A server for RETRO models that speaks OpenAI's protocol, and the engine behind it."""
